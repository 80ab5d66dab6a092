// CUDA 커널을 CPU에서 돌리는 최소한의 흉내. 스레드 하나가 fiber 하나, 블록 하나가 OS 스레드 하나다.
// kernels/device.cuh(PTX)의 자리에 들어간다. 나머지 커널 소스는 한 글자도 바꾸지 않고 그대로 컴파일한다.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Dim { u32 x, y, z; };

#define __global__
#define __device__
#define __forceinline__ inline
#define __constant__ static const
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

enum State { RUNNING, AT_BARRIER, DONE };
struct Fiber { void* stack_pointer; State state; u32 id; };
// 주고받는 자리가 둘이라 한 번만 기다린다: 다음 교환은 다른 자리에 적고, 그다음 교환은 모두가 읽은 뒤에야 시작한다.
struct Warp { u64 slot[2][32]; float a[2][16][16], b[2][8][16]; int arrived = 0, live = 0; u32 generation = 0; };
struct Block {
    Dim index, size, grid;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<uint4> dynamic;
    int arrived = 0, live = 0, count = 0, counted = 0;
    void* scheduler;
    void (*body)(void*);
    void* argument;
};
static thread_local Block* block;
static thread_local Fiber* fiber;

extern "C" void switch_stack(void** save, void* load);
asm(R"(
.text
.globl switch_stack
switch_stack:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");

static void yield() { switch_stack(&fiber->stack_pointer, block->scheduler); }

static void release_block() {
    if (block->live && block->arrived == block->live) {
        block->arrived = 0, block->counted = block->count, block->count = 0;
        for (Fiber& other : block->fibers)
            if (other.state == AT_BARRIER) other.state = RUNNING;
    }
}
static void __syncthreads() {
    block->arrived++;
    fiber->state = AT_BARRIER;
    release_block();
    if (fiber->state == AT_BARRIER) yield();
}
static int __syncthreads_count(bool value) {
    block->count += value;
    __syncthreads();
    int result = block->counted;
    __syncthreads();
    return result;
}
static Warp& warp() { return block->warps[fiber->id / 32]; }
static void release_warp(Warp& own) {
    if (own.live && own.arrived == own.live) own.arrived = 0, own.generation++;
}
static void sync_warp() {
    Warp& own = warp();
    u32 generation = own.generation;
    own.arrived++;
    release_warp(own);
    while (own.generation == generation) yield();
}

static void fiber_main() {
    block->body(block->argument);
    fiber->state = DONE;
    block->live--, warp().live--;
    release_warp(warp());
    release_block();
    yield();
}

// 블록의 fiber들이 쓰는 스택. 지우지 않고 다음 블록이 다시 쓴다.
enum { STACK = 64 << 10 };
static std::mutex stacks_lock;
static std::vector<std::pair<size_t, char*>> stacks;
static char* take_stacks(size_t count) {
    std::lock_guard<std::mutex> guard(stacks_lock);
    for (auto one = stacks.begin(); one != stacks.end(); ++one)
        if (one->first == count) {
            char* memory = one->second;
            stacks.erase(one);
            return memory;
        }
    return (char*)malloc(count * STACK);
}

static void run_block(Block& own) {
    block = &own;
    char* memory = take_stacks(own.fibers.size());
    for (u32 i = 0; i < own.fibers.size(); i++) {
        Fiber& one = own.fibers[i];
        one.id = i, one.state = RUNNING;
        u64* top = (u64*)((uintptr_t)(memory + (i + 1) * STACK - i % 64 * 64) & ~(uintptr_t)15);
        *--top = 0;  // ret으로 들어온 함수의 스택은 16의 배수에서 8이 모자라야 한다
        *--top = (u64)fiber_main;
        for (int r = 0; r < 6; r++) *--top = 0;
        one.stack_pointer = top;
        own.warps[i / 32].live++, own.live++;
    }
    while (own.live)
        for (u32 first = 0; first < own.fibers.size(); first += 32) {
            bool again = true;
            while (again) {
                again = false;
                for (u32 i = first; i < first + 32 && i < own.fibers.size(); i++) {
                    fiber = &own.fibers[i];
                    if (fiber->state != RUNNING) continue;
                    again = true;
                    switch_stack(&own.scheduler, fiber->stack_pointer);
                }
            }
        }
    std::lock_guard<std::mutex> guard(stacks_lock);
    stacks.push_back({own.fibers.size(), memory});
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}
template <class... A> static void launch(void (*kernel)(A...), const u32* sizes, void** arguments) {
    struct Call { void (*kernel)(A...); void** arguments; } one{kernel, arguments};
    std::vector<Block> blocks(sizes[0] * sizes[1] * sizes[2]);
    std::vector<std::thread> threads;
    for (u32 i = 0; i < blocks.size(); i++) {
        Block& own = blocks[i];
        own.grid = {sizes[0], sizes[1], sizes[2]}, own.size = {sizes[3], 1, 1};
        own.index = {i % sizes[0], i / sizes[0] % sizes[1], i / sizes[0] / sizes[1]};
        own.fibers.resize(sizes[3]), own.warps.resize((sizes[3] + 31) / 32), own.dynamic.resize(sizes[4] / 16 + 1);
        own.body = [](void* given) {
            Call* call_ = (Call*)given;
            call(call_->kernel, call_->arguments, std::index_sequence_for<A...>{});
        };
        own.argument = &one;
        threads.emplace_back([&own] { run_block(own); });
        if (threads.size() == 32) {
            for (auto& thread : threads) thread.join();
            threads.clear();
        }
    }
    for (auto& thread : threads) thread.join();
}

#define threadIdx (Dim{fiber->id, 0, 0})
#define blockIdx (block->index)
#define blockDim (block->size)
#define gridDim (block->grid)
#define shared ((char*)block->dynamic.data())

template <class T> static T exchange(T value, int source) {
    Warp& own = warp();
    u64 bits = 0, *slot = own.slot[own.generation % 2];
    memcpy(&bits, &value, sizeof(T));
    slot[fiber->id % 32] = bits;
    sync_warp();
    bits = slot[source];
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T> static T __shfl_xor_sync(u32, T value, int step) { return exchange(value, (fiber->id % 32) ^ step); }
template <class T> static T __shfl_sync(u32, T value, int source) { return exchange(value, source); }
template <class T> static T __shfl_up_sync(u32, T value, int step) {
    int lane = fiber->id % 32;
    return exchange(value, lane >= step ? lane - step : lane);
}
static u32 __activemask() { return ~0u; }
static void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
static u32 atomicOr(u32* at, u32 value) { return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST); }
static u64 atomicMax(u64* at, u64 value) {
    u64 old = *at;
    *at = old > value ? old : value;
    return old;
}
template <class T> static T __ldg(const T* at) { return *at; }
template <class T> static T __ldcg(const T* at) { return *at; }
template <class T> static T __ldcs(const T* at) { return *at; }
static u32 __float_as_uint(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
static u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
static float rsqrtf(float value) { return 1.f / sqrtf(value); }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

static void wait_for_previous_kernel() {}
static void let_next_kernel_start() {}
static void __syncwarp() { sync_warp(); }
static void prefetch(const void*) {}
static void copy_async(void* to, const void* from) { memcpy(to, from, 16); }
static void copy_word(void* to, const void* from) { memcpy(to, from, 4); }
static void end_of_copies() {}
template <int LEFT> static void wait_for_copies() {}
static uint4 load_weight(const void* at) { return *(const uint4*)at; }
static uint2 load_weight8(const void* at) { return *(const uint2*)at; }
template <bool BF> static u16 narrow(float value) {
    u16 bits;
    if (BF) {
        u32 word = __float_as_uint(value);
        return (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    _Float16 half = (_Float16)fminf(fmaxf(value, -65504.f), 65504.f);
    memcpy(&bits, &half, 2);
    return bits;
}
template <bool BF> static float widen(u16 bits) {
    if (BF) return __uint_as_float((u32)bits << 16);
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
}
template <bool BF> static void split_pair(float first, float second, u32& high, u32& low) {
    u16 top[2] = {narrow<BF>(first), narrow<BF>(second)};
    high = top[0] | (u32)top[1] << 16;
    low = narrow<BF>(first - widen<BF>(top[0])) | (u32)narrow<BF>(second - widen<BF>(top[1])) << 16;
}
static void wait_until(const int* at, int count) {
    while (__atomic_load_n(at, __ATOMIC_ACQUIRE) < count) std::this_thread::yield();
}
static u32 shared_address(const void* pointer) { return (const char*)pointer - shared; }
template <int AT> static u32 shared_word(u32 offset) { return *(const u32*)(shared + AT + offset); }
template <int BYTE> static u32 byte_above(u32 word, u32 low) { return (word >> BYTE * 8 & 255) << 8 | low; }
static uint2 int8_to_fp16(u32 word) {
    u16 half[4];
    for (int i = 0; i < 4; i++) half[i] = narrow<false>((float)(signed char)(word >> i * 8));
    return {half[0] | (u32)half[1] << 16, half[2] | (u32)half[3] << 16};
}
// 텐서 코어의 레인 배치는 PTX 문서의 m16n8k16을 따른다.
template <bool BF> static void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Warp& own = warp();
    int lane = fiber->id % 32;
    auto& left = own.a[own.generation % 2];   // [16 행, 16 k]
    auto& right = own.b[own.generation % 2];  // [8 열, 16 k]
    u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    for (int half = 0; half < 2; half++) {
        int k = lane % 4 * 2 + half;
        for (int i = 0; i < 4; i++) left[lane / 4 + i % 2 * 8][k + i / 2 * 8] = widen<BF>(a[i] >> half * 16);
        for (int i = 0; i < 2; i++) right[lane / 4][k + i * 8] = widen<BF>(b[i] >> half * 16);
    }
    sync_warp();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0.f;
        for (int k = 0; k < 16; k++) sum += left[row][k] * right[column][k];
        c[i] += sum;
    }
}
