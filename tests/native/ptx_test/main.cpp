// The machine of native/ptx, one group of instructions after the other, against the PTX ISA manual, 9.0.
#include "lines.h"

int main() {
  using namespace ptx::test;
  for (const auto group : {arithmetic, memory, barriers, warps, tma, tensor_cores, programs}) group();
  return failures != 0;
}
