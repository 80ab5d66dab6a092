// 토큰 하나를 만드는 커널들이 함께 쓰는 것: 16비트 변환, 텐서 코어, 블록 합.
// 컴파일할 때 정하는 상수: HIDDEN FF HEADS HEAD_DIM ROTARY CONTEXT VOCAB RANK NF4 DOUBLE_QUANT BF16 GROUP

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define WARPS 16
#define THREADS (WARPS * 32)
// 활성값의 자리 act: [FF + HIDDEN]칸의 위 절반과 아래 절반. 앞의 FF칸은 gelu, 뒤의 HIDDEN칸은 attention의 출력이다.
#define ACT (FF + HIDDEN)
#define ACT_BF16 (BF16 && !NF4)  // NF4는 코드표도 활성값도 fp16이다. bf16보다 정밀하다

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

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

// 활성값 하나를 16비트 둘(위, 아래)로 나누어 적는다. 둘을 더하면 fp32에 가깝다.
template <bool BF> __device__ __forceinline__ void store_split(u16* high, u16* low, float value) {
    u16 top = narrow<BF>(value);
    *high = top;
    *low = narrow<BF>(value - widen<BF>(top));
}

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

__device__ __forceinline__ uint4 load_weight(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// 블록 전체의 합. scratch는 float 32개.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
    value = (threadIdx.x & 31) < (blockDim.x >> 5) ? scratch[threadIdx.x & 31] : 0.f;
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    return value;
}
