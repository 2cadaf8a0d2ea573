#include "lines.h"

namespace ptx::test {
namespace {

// Each thread hands a word to the thread of the same lane of the other warp.
Lines exchange(const std::string& barrier) {
  Lines lines{
      kEachThread +
          "mov.u64 %r0, memory; mul.wide.u32 %r1, %r70, 4; add.s64 %r1, %r0, %r1; st.shared.u32 [%r1], %r70;\n" +
          barrier +
          "\nxor.b32 %r2, %r70, 32; mul.wide.u32 %r2, %r2, 4; add.s64 %r2, %r0, %r2; ld.shared.u32 %r3, [%r2];\n"
          "st.global.u64 [%r71], %r3;",
      {}};
  lines.threads = 64, lines.out_words = 64, lines.shared_bytes = 256;
  return lines;
}

int runs_that_are_right(Lines lines) {
  int right = 0;
  for (lines.seed = 0; lines.seed < 20; ++lines.seed) {
    const Words out = lines.run();
    bool same = true;
    for (uint64_t n = 0; n < 64; ++n) same = same && out[n] == (n ^ 32);
    right += same;
  }
  return right;
}

void of_a_block() {
  CHECK(runs_that_are_right(exchange("bar.sync 0;")) == 20);
  CHECK(runs_that_are_right(exchange("bar.sync 3, 64;")) == 20);
  CHECK(runs_that_are_right(exchange("")) < 20);
  CHECK(holds(exchange("bar.sync 16;").error(), "no such barrier"));
  CHECK(holds(exchange("bar.sync 0, 40;").error(), "no multiple of 32"));
  CHECK(holds(exchange("bar.sync 1, 0;").error(), "no multiple of 32"));
  // One warp waits for more than will come.
  Lines alone = exchange("setp.lt.u32 %p1, %r70, 32; @%p1 bar.sync 1, 64;");
  CHECK(holds(alone.error(), "deadlock") && holds(alone.error(), "bar.sync"));
  CHECK(runs_that_are_right(exchange("setp.lt.u32 %p1, %r70, 32; @%p1 bar.sync 1, 32; bar.sync 0;")) == 20);
}

// A long computation is no deadlock.
void patience() {
  const Lines counts{
      "mov.u32 %r0, 0;\n$L__loop:\nadd.s32 %r0, %r0, 1; setp.lt.u32 %p0, %r0, 500000; @%p0 bra $L__loop;\n"
      "st.global.u64 [%out], %r0;",
      {}};
  CHECK(counts.run()[0] == 500000);
}

// Thread 0 of two warps prepares an mbarrier, and warp 1 waits for `arrivals` of warp 0.
Lines hand_over(int count, const std::string& arrivals) {
  Lines lines{
      kEachThread + "mov.u64 %r0, memory; setp.eq.s32 %p0, %r70, 0;\n@%p0 mbarrier.init.shared::cta.b64 [%r0], " +
          std::to_string(count) + ";\nbar.sync 0; setp.lt.u32 %p1, %r70, 32; @!%p1 bra $L__wait;\n" + arrivals +
          "\nbra $L__end;\n$L__wait:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r0], 0;\n"
          "@!%p2 bra $L__wait;\nld.shared.u32 %r5, [%r0+8]; st.global.u64 [%r71], %r5;\n$L__end:",
      {}};
  lines.threads = 64, lines.out_words = 64, lines.shared_bytes = 16;
  return lines;
}

void mbarriers() {
  const std::string stores = "st.shared.u32 [%r0+8], 7; ", arrives = "mbarrier.arrive.shared::cta.b64 %r4, [%r0];";
  for (uint64_t seed = 0; seed < 10; ++seed) {
    Lines lines = hand_over(32, stores + arrives);
    lines.seed = seed;
    CHECK(lines.run()[40] == 7);
  }
  CHECK(holds(hand_over(33, arrives).error(), "deadlock"));
  CHECK(holds(hand_over(0, arrives).error(), "mbarrier.init: count"));
  // One arrival that announces bytes which never come.
  CHECK(holds(hand_over(1, "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 %r4, [%r0], 16;").error(), "deadlock"));
  // Nor does a thread compute that polls with work in between, which 20 additions stand for.
  std::string polls = "$L__poll:\n";
  for (int n = 0; n < 20; ++n) polls += "add.s32 %r6, %r6, 1; ";
  polls += "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r0], 0; @!%p3 bra $L__poll;";
  CHECK(holds(hand_over(33, polls).error(), "deadlock"));
  // An arrival more than the count, within one phase that bytes keep open.
  CHECK(holds(hand_over(1, "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 %r4, [%r0], 16; @%p0 " + arrives).error(),
              "more arrivals than its count"));
  // Each phase takes the count anew.
  std::string phases =
      "mov.u64 %r0, memory; setp.eq.s32 %p0, %r70, 0; @%p0 mbarrier.init.shared::cta.b64 [%r0], 32; bar.sync 0;\n";
  for (const std::string parity : {"0", "1", "0"}) {
    const std::string label = "$L__phase" + std::to_string(phases.size());
    phases += arrives + "\n" + label + ":\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r0], " + parity +
              "; @!%p3 bra " + label + ";\n";
  }
  Lines three_phases{kEachThread + phases + "st.global.u64 [%r71], 3;", {}};
  three_phases.out_words = 32, three_phases.shared_bytes = 16;
  CHECK(three_phases.run() == Words(32, 3));
  // The phase after the next: a thread that waits for parity 1 passes at once, as the first phase's predecessor.
  CHECK(hand_over(32, stores + "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r0], 1; @%p3 " + arrives).run()[40] ==
        7);
  CHECK(holds(
      Lines{"mov.u64 %r0, memory; mbarrier.arrive.shared::cta.b64 %r4, [%r0+4];", {}, 1, 32, 1, false, 16}.error(),
      "shared memory"));
}

// Each block reads what the other has stored.
Lines of_a_cluster(const std::string& before, const std::string& after) {
  Lines lines{
      "mov.u64 %r0, memory; mov.u32 %r1, %cluster_ctarank; st.shared.u32 [%r0], %r1;\n" + before +
          "\nxor.b32 %r2, %r1, 1; mapa.shared::cluster.u32 %r3, %r0, %r2; ld.shared.u32 %r4, [%r3];\n"
          "mul.wide.u32 %r5, %r1, 8; add.s64 %r5, %out, %r5; add.s32 %r4, %r4, 10; st.global.u64 [%r5], %r4;\n" +
          after,
      {}};
  lines.blocks = 2, lines.one_cluster = true, lines.out_words = 2, lines.shared_bytes = 16;
  return lines;
}

void clusters() {
  const std::string barrier = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;";
  bool differs = false, ends = false;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Lines right = of_a_cluster(barrier, barrier), early = of_a_cluster("", barrier), gone = of_a_cluster(barrier, "");
    right.seed = early.seed = gone.seed = seed;
    CHECK(right.run() == (Words{11, 10}));
    differs = differs || early.run() != right.run();
    ends = ends || holds(gone.error(), "a block that has ended");
  }
  CHECK(differs && ends);
  Lines outside = of_a_cluster("mov.u32 %r1, 4;", "");
  CHECK(holds(outside.error(), "mapa: no such block"));
}

}  // namespace

void barriers() {
  of_a_block();
  patience();
  mbarriers();
  clusters();
}

}  // namespace ptx::test
