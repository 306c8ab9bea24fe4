// Fibers: a stack for every thread of a block, and the switch between them and the scheduler.
#include <sys/mman.h>

#include <cstdlib>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace nf4::emulation {

namespace {

void* g_scheduler_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
void* g_scheduler_fake_stack = nullptr;
const void* g_scheduler_bottom = nullptr;
size_t g_scheduler_size = 0;
#endif
std::vector<unsigned char*> g_stacks;

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and takes them from the new one.
asm(R"(
.text
.type nf4_switch_stack, @function
nf4_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size nf4_switch_stack, .-nf4_switch_stack
)");
#else
#error "nf4's emulation of CUDA switches stacks in x86-64 assembly"
#endif
extern "C" void nf4_switch_stack(void** save, void* load);

}  // namespace

void switch_to_fiber(Thread* thread) {
  g_thread = thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&g_scheduler_fake_stack, thread->stack, kStackBytes);
#endif
  nf4_switch_stack(&g_scheduler_stack, thread->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(g_scheduler_fake_stack, nullptr, nullptr);
#endif
  g_thread = nullptr;
}

void yield_to_scheduler() {
  Thread* thread = g_thread;
#if defined(__SANITIZE_ADDRESS__)
  void** save = thread->state == Thread::State::kDone ? nullptr : &thread->fake_stack;
  __sanitizer_start_switch_fiber(save, g_scheduler_bottom, g_scheduler_size);
#endif
  nf4_switch_stack(&thread->stack_pointer, g_scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread->fake_stack, &g_scheduler_bottom, &g_scheduler_size);
#endif
}

namespace {

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &g_scheduler_bottom, &g_scheduler_size);
#endif
  (*g_block->kernel)();
  g_thread->state = Thread::State::kDone;
  yield_to_scheduler();
  std::abort();  // a finished fiber is never resumed
}

unsigned char* stack_of(size_t index) {
  while (g_stacks.size() <= index) {
    const size_t guard = 4096;
    void* memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(memory, guard, PROT_NONE);
    g_stacks.push_back(static_cast<unsigned char*>(memory) + guard);
  }
  return g_stacks[index];
}

}  // namespace

void poison(void* address, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(address, bytes);
#endif
}

void unpoison(void* address, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(address, bytes);
#endif
}

void prepare(Thread& thread) {
  thread.stack = stack_of(thread.slot);
  unpoison(thread.stack, kStackBytes);
  auto** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
  *--top = nullptr;  // the return address that the ABI aligns the stack around
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

}  // namespace nf4::emulation
