// PTX 명령을 감싼 함수들: 16비트 변환, 텐서 코어, 커널과 블록 사이의 신호.
// 토큰을 만드는 커널의 PTX는 모두 이 파일에 있다. 나머지는 평범한 CUDA C++라서, 이 파일만 바꾸면 GPU 없이 CPU에서 돌려
// 볼 수 있다(tests/cuda_on_cpu.py).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

// 앞 커널이 끝나고 그 결과가 보일 때까지 기다린다(programmatic dependent launch).
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 다음 커널이 시작해도 된다고 알린다. 다음 커널은 가중치를 미리 읽으며 위의 wait에서 기다린다.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// fp32를 16비트로 줄인다. fp16은 범위를 넘으면 가장 큰 수로 자른다.
template <bool BF> __device__ __forceinline__ u16 narrow(float value) {
    u16 bits;
#if __CUDA_ARCH__ >= 800
    if (BF) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
#endif
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(fminf(fmaxf(value, -65504.f), 65504.f)));
    return bits;
}

template <bool BF> __device__ __forceinline__ float widen(u16 bits) {
    if (BF) return __uint_as_float((u32)bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// fp32 둘을 위와 아래 절반의 16비트 둘씩으로 나눈다. 앞의 값이 낮은 16비트다.
template <bool BF> __device__ __forceinline__ void split_pair(float first, float second, u32& high, u32& low) {
#if __CUDA_ARCH__ >= 800
    if (!BF) first = fminf(fmaxf(first, -65504.f), 65504.f), second = fminf(fmaxf(second, -65504.f), 65504.f);
    if (BF) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(second), "f"(first));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(second), "f"(first));
    first -= widen<BF>((u16)high), second -= widen<BF>((u16)(high >> 16));
    if (BF) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(second), "f"(first));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(second), "f"(first));
#else
    u16 top[2] = {narrow<BF>(first), narrow<BF>(second)};
    high = top[0] | (u32)top[1] << 16;
    low = narrow<BF>(first - widen<BF>(top[0])) | (u32)narrow<BF>(second - widen<BF>(top[1])) << 16;
#endif
}

// 텐서 코어: c [16 x 8] += a [16 x 16] b [16 x 8]. 레인마다 a 여덟 개, b 네 개, c 네 개를 쥔다.
// 레인 4g + t의 c[0], c[1]은 행 g의 열 2t, 2t + 1이고 c[2], c[3]은 행 g + 8의 같은 열이다.
template <bool BF> __device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    if (BF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// 가중치는 한 번만 읽으므로 L1에 남기지 않는다.
__device__ __forceinline__ uint4 load_weight(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ uint2 load_weight8(const void* address) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
}

// 16바이트를 공유 메모리로 베끼기 시작한다. end_of_copies가 한 묶음을 맺고, wait_for_copies는 최근의 LEFT묶음만 남을 때까지
// 제 것이 끝나기를 기다린다.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
    *(uint4*)to = *(const uint4*)from;
#endif
}
// 4바이트를 그렇게 한다.
__device__ __forceinline__ void copy_word(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
    *(u32*)to = *(const u32*)from;
#endif
}
__device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT> __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// int8 넷(한 워드)을 fp16 둘씩으로 바꾼다. 1024 + (값 + 128)의 fp16을 비트로 만들고 1152를 뺀다. 반올림이 없다.
__device__ __forceinline__ uint2 int8_to_fp16(u32 word) {
    word ^= 0x80808080u;
    u32 low = __byte_perm(word, 0x64646464u, 0x4140), high = __byte_perm(word, 0x64646464u, 0x4342);
    asm("sub.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x64806480u));
    asm("sub.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x64806480u));
    return {low, high};
}

// *at이 count에 닿기를 기다린다. 그전에 다른 블록이 적은 것이 그 뒤에 보인다.
__device__ __forceinline__ void wait_until(const int* at, int count) {
    int now;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
    while (now < count);
}

// 공유 메모리 안의 주소(바이트).
__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 공유 메모리의 주소 AT + offset에 든 워드. AT이 상수라서 주소를 더하는 명령이 없다. 그 주소에 적고 동기화한 다음에 부른다.
template <int AT> __device__ __forceinline__ u32 shared_word(u32 offset) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(offset), "n"(AT));
    return word;
}

// word의 BYTE번째 바이트 x 256 + low(256보다 작다). 명령 하나다.
template <int BYTE> __device__ __forceinline__ u32 byte_above(u32 word, u32 low) {
    return __byte_perm(word, low, 0x5504 | BYTE << 4);
}
