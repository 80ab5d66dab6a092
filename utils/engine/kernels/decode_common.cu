// 토큰을 만드는 커널들이 함께 쓰는 것: 활성값을 나누어 적기, 워프와 블록의 합.
// 컴파일할 때 정하는 상수는 모두 decode_plan.py의 `Plan.defines`가 만든다. 커널은 아무것도 새로 정하지 않는다.

// 활성값 하나를 16비트 둘(위, 아래)로 나누어 적는다. 둘을 더하면 fp32에 가깝다.
template <bool BF> __device__ __forceinline__ void store_split(u16* high, u16* low, float value) {
    u16 top = narrow<BF>(value);
    *high = top;
    *low = narrow<BF>(value - widen<BF>(top));
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// 블록 전체의 합. scratch는 float 32개.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
    __syncthreads();
    return warp_sum((threadIdx.x & 31) < (blockDim.x >> 5) ? scratch[threadIdx.x & 31] : 0.f);
}

template <bool FIRST, class A, class B> struct Choose { typedef A Type; };
template <class A, class B> struct Choose<false, A, B> { typedef B Type; };
