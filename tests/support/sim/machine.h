// Runs CUDA kernels on a CPU: one fiber per CUDA thread, blocks one after another.
//
// A thread gives up the processor only in __syncthreads(), in a warp collective and at its end, so the schedule is a
// function of LaunchConfig::seed, and a missing barrier shows as a wrong value or a message. Knows nothing of CUDA's
// names: cuda.h spells them. Not modelled: races between blocks, weak memory, registers, bank conflicts.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <type_traits>
#include <utility>
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// The race checker watches the kernel's memory, not the machine's own state.
#define SIMT_OWN __attribute__((no_sanitize("thread"), noinline))
#else
#define SIMT_OWN
#endif

#if !defined(__SANITIZE_ADDRESS__)  // its red zones would stand between shared variables: no section to poison
extern "C" char __start_simt_shared[] __attribute__((weak)), __stop_simt_shared[] __attribute__((weak));
#endif

namespace simt {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32, kMaxSharedBytes = 227 * 1024, kMaxCopies = 256;
constexpr size_t kStackBytes = 256 * 1024;

struct Index3 {
  unsigned x, y, z;
};
struct LaunchConfig {  // laid out as in simulator.py
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  int64_t seed;
};
enum State : uint8_t { kReady, kAtBlockBarrier, kInCollective, kDone };
struct AsyncCopy {  // a cp.async that nobody has waited for yet
  void* to;
  const void* from;
  int group;
};
struct Fiber {
  Index3 index;
  int number;
  State state;
  void* stack_pointer;
  int num_copies, group;
  AsyncCopy copies[kMaxCopies];
#if defined(SIMT_UCONTEXT)
  ucontext_t context;
#endif
  void* tsan;
};
struct Warp {
  uint32_t generation;
  char epochs[2];
  uint32_t arrived, masks[32];
  const char* kinds[32];
  int args[32];
  alignas(16) unsigned char in[32][64], out[32][64];
};
struct Machine {
  Fiber* fibers;
  char* stacks;
  Warp warps[kMaxWarps];
  Fiber* current;
  Index3 block, grid_size, block_size;
  int num_threads, num_alive, num_waiting, epoch;
  int next_any, next_all, next_count, any, all, count;  // of __syncthreads_or and its like
  char epochs[2];
  bool failed;
  char message[512];
  alignas(128) unsigned char shared[kMaxSharedBytes];
  size_t shared_bytes;
  void (*body)(void*);
  void* arguments;
  void* main_stack_pointer;
#if defined(SIMT_UCONTEXT)
  ucontext_t main_context;
#endif
  void* tsan_main;
  const void* asan_bottom;
  size_t asan_size;
};

inline void* zeroed_pages(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
inline Machine& new_machine() {
  auto* machine = static_cast<Machine*>(zeroed_pages(sizeof(Machine)));
  machine->fibers = static_cast<Fiber*>(zeroed_pages(sizeof(Fiber) * kMaxThreads));
  machine->stacks = static_cast<char*>(zeroed_pages(kStackBytes * kMaxThreads));
  return *machine;
}
static Machine& g = new_machine();

// ---- switching fibers ----------------------------------------------------------------------------------------

#if !defined(SIMT_UCONTEXT)
extern "C" void simt_switch(void** save, void* load);
#if defined(__x86_64__)
asm(".text\n.weak simt_switch\nsimt_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
#elif defined(__aarch64__)
asm(".text\n.weak simt_switch\nsimt_switch:\n sub sp,sp,#160\n"
    " stp x19,x20,[sp]\n stp x21,x22,[sp,#16]\n stp x23,x24,[sp,#32]\n stp x25,x26,[sp,#48]\n"
    " stp x27,x28,[sp,#64]\n stp x29,x30,[sp,#80]\n"
    " stp d8,d9,[sp,#96]\n stp d10,d11,[sp,#112]\n stp d12,d13,[sp,#128]\n stp d14,d15,[sp,#144]\n"
    " mov x9,sp\n str x9,[x0]\n mov sp,x1\n"
    " ldp x19,x20,[sp]\n ldp x21,x22,[sp,#16]\n ldp x23,x24,[sp,#32]\n ldp x25,x26,[sp,#48]\n"
    " ldp x27,x28,[sp,#64]\n ldp x29,x30,[sp,#80]\n"
    " ldp d8,d9,[sp,#96]\n ldp d10,d11,[sp,#112]\n ldp d12,d13,[sp,#128]\n ldp d14,d15,[sp,#144]\n"
    " add sp,sp,#160\n ret\n");
#else
#error "this processor needs -DSIMT_UCONTEXT"
#endif
#endif

inline void happens_before_release(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#else
  (void)address;
#endif
}
inline void happens_before_acquire(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#else
  (void)address;
#endif
}

SIMT_OWN inline void to_scheduler(Fiber* me, bool is_last) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(is_last ? nullptr : &fake, g.asan_bottom, g.asan_size);
#endif
  (void)is_last;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(g.tsan_main, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&me->context, &g.main_context);
#else
  simt_switch(&me->stack_pointer, g.main_stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &g.asan_bottom, &g.asan_size);
#endif
}
SIMT_OWN inline void to_fiber(Fiber* fiber) {
  g.current = fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(&fake, g.stacks + kStackBytes * fiber->number, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&g.main_context, &fiber->context);
#else
  simt_switch(&g.main_stack_pointer, fiber->stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}
[[noreturn]] inline void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(g.message, sizeof g.message, format, args);
  va_end(args);
  g.failed = true;
  to_scheduler(g.current, true);
  abort();
}
SIMT_OWN inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g.asan_bottom, &g.asan_size);
#endif
  happens_before_acquire(&g.num_threads);
  g.body(g.arguments);
  happens_before_release(&g.num_alive);
  Fiber* me = g.current;
  if (me->num_copies)
    fail("thread %d of block (%u,%u,%u) ended with %d cp.async copies never waited for", me->number, g.block.x,
         g.block.y, g.block.z, me->num_copies);
  me->state = kDone;
  g.num_alive--;
  to_scheduler(me, true);
  abort();
}
SIMT_OWN inline void start_fiber(int number, const uint32_t* size) {
  Fiber& fiber = g.fibers[number];
  const unsigned lin = number;
  fiber.number = number;
  fiber.index = {lin % size[0], lin / size[0] % size[1], lin / (size[0] * size[1])};
  fiber.state = kReady;
  fiber.num_copies = fiber.group = 0;
  char* top = g.stacks + kStackBytes * (number + 1);
#if defined(SIMT_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = top - kStackBytes;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#elif defined(__x86_64__)
  void** entry = reinterpret_cast<void**>(top) - 2;
  *entry = reinterpret_cast<void*>(fiber_main);
  fiber.stack_pointer = entry - 6;
  memset(fiber.stack_pointer, 0, 48);
#else
  char* frame = top - 160;
  memset(frame, 0, 160);
  *reinterpret_cast<void**>(frame + 88) = reinterpret_cast<void*>(fiber_main);
  fiber.stack_pointer = frame;
#endif
#if defined(__SANITIZE_THREAD__)
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

// ---- what threads wait for --------------------------------------------------------------------------------------

SIMT_OWN inline void block_barrier() {
  Fiber* me = g.current;
  char* epoch = &g.epochs[g.epoch & 1];
  happens_before_release(epoch);
  me->state = kAtBlockBarrier;
  g.num_waiting++;
  to_scheduler(me, false);
  happens_before_acquire(epoch);
}
// Every lane of `mask` leaves its input in the warp; the last to arrive computes what all of them get.
template <class Finish>
SIMT_OWN inline void collective(uint32_t mask, const char* kind, Finish finish) {
  Fiber* me = g.current;
  Warp& warp = g.warps[me->number >> 5];
  const int lane = me->number & 31;
  char* epoch = &warp.epochs[warp.generation & 1];
  happens_before_release(epoch);
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask 0x%08x", kind, lane, mask);
  warp.masks[lane] = mask;
  warp.kinds[lane] = kind;
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) != mask) {
    me->state = kInCollective;
    to_scheduler(me, false);
    happens_before_acquire(epoch);
    return;
  }
  for (int i = 0; i < 32; i++)
    if ((mask >> i & 1) && (warp.masks[i] != mask || warp.kinds[i] != kind))
      fail("divergent warp collective: lane %d in %s(0x%08x), lane %d in %s(0x%08x)", lane, kind, mask, i,
           warp.kinds[i], warp.masks[i]);
  happens_before_acquire(epoch);
  finish(warp, mask);
  happens_before_release(epoch);
  warp.arrived &= ~mask;
  warp.generation++;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) g.fibers[(me->number & ~31) + i].state = kReady;
}
SIMT_OWN inline Warp& my_warp() { return g.warps[g.current->number >> 5]; }
SIMT_OWN inline int my_lane() { return g.current->number & 31; }

}  // namespace simt
