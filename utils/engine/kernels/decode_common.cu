// 토큰을 만드는 커널들이 함께 쓰는 것: 활성값을 나누어 적기, 워프와 블록의 합.
// 컴파일할 때 정하는 상수는 모두 decode_plan.py의 `Plan.defines`가 만든다. 커널은 아무것도 새로 정하지 않는다.

// 활성값 하나를 16비트 둘(위, 아래)로 나누어 적는다. 둘을 더하면 fp32에 가깝다.
template <bool BF> __device__ __forceinline__ void store_split(u16* high, u16* low, float value) {
    u16 top = narrow<BF>(value);
    *high = top;
    *low = narrow<BF>(value - widen<BF>(top));
}

// 함께 답할 때 선형층의 입력에서 칸이 놓이는 자리. 16비트가 아닌 가중치에서는 레인이 이어진 16칸을 맡으므로, 칸 64개마다 8칸씩
// 섞어 두면 이웃한 레인 넷이 이어진 64바이트를 읽는다.
__device__ __forceinline__ int line_place(int column) {
    if (WEIGHT == WIDE_WEIGHT) return column;
    return (column & ~63) | (column >> 3 & 1) << 5 | (column >> 4 & 3) << 3 | (column & 7);
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
