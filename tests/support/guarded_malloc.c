// For LD_PRELOAD: every aligned allocation (torch's tensors, the kernels' work memory) ends at a page that may not be
// touched, and its pages may not be touched once it is freed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { kPage = 4096 };
static const size_t kReserved = (size_t)1 << 37, kLargest = (size_t)64 << 20;
static char *begin, *next;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *guarded(size_t size, size_t alignment) {
  const size_t used = (size + kPage - 1) / kPage * kPage;
  pthread_mutex_lock(&lock);
  if (begin == NULL) {
    begin = mmap(NULL, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    next = begin;
  }
  // The first page holds the number of bytes.
  char *const block = next;
  const int fits = begin != MAP_FAILED && block + used + 2 * kPage <= begin + kReserved;
  if (fits) next += used + 2 * kPage;
  pthread_mutex_unlock(&lock);
  if (!fits || mprotect(block, used + kPage, PROT_READ | PROT_WRITE) != 0) return NULL;
  *(size_t *)block = used;
  return block + kPage + (used - size) / alignment * alignment;
}

int posix_memalign(void **result, size_t alignment, size_t size) {
  (void)alignment;  // A tensor's elements need their own size's only, which divides the tensor's.
  static int (*real)(void **, size_t, size_t);
  if (real == NULL) real = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  if (size == 0 || size > kLargest) return real(result, alignment, size);
  *result = guarded(size, 1);
  return *result == NULL ? ENOMEM : 0;
}

void *aligned_alloc(size_t alignment, size_t size) {
  static void *(*real)(size_t, size_t);
  if (real == NULL) real = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  return size == 0 || size > kLargest || alignment > kPage ? real(alignment, size) : guarded(size, alignment);
}

void free(void *data) {
  static void (*real)(void *);
  char *const p = data;
  if (begin != NULL && begin != MAP_FAILED && p >= begin && p < begin + kReserved) {
    // Back to where its block begins: what lies between is at most an alignment's worth.
    char *block = (char *)((uintptr_t)p / kPage * kPage) - kPage;
    const size_t used = *(size_t *)block;
    madvise(block, used + kPage, MADV_DONTNEED);
    mprotect(block, used + kPage, PROT_NONE);
    return;
  }
  if (real == NULL) real = (void (*)(void *))dlsym(RTLD_NEXT, "free");
  real(data);
}
