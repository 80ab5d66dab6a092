// 토큰 하나의 rotary, int8 KV cache, attention.

#define LANE 16        // 레인 하나가 맡는 칸
#define CHUNK 64       // 블록 하나가 맡는 위치의 수
#define ATTENDERS 256  // 블록의 스레드 수
#define SPLITS ((CONTEXT + CHUNK - 1) / CHUNK)

__device__ __forceinline__ float rotate(const float* head, const float2* turns, int d) {
    if (d >= ROTARY) return head[d];
    float2 turn = turns[d % (ROTARY / 2)];
    return d < ROTARY / 2 ? head[d] * turn.x - head[d + ROTARY / 2] * turn.y
                          : head[d] * turn.x + head[d - ROTARY / 2] * turn.y;
}

// GROUP칸을 int8로 적고 fp16 scale 하나를 남긴다. 이어진 GROUP개 스레드가 함께 부른다.
__device__ __forceinline__ void store_int8(signed char* cache, u16* scales, size_t index, float value) {
    float largest = fabsf(value);
    for (int step = GROUP / 2; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(__activemask(), largest, step));
    u16 bits = narrow<false>(largest / 127.f);
    float scale = widen<false>(bits);
    cache[index] = (signed char)(scale > 0.f ? fminf(fmaxf(rintf(value / scale), -127.f), 127.f) : 0.f);
    if (index % GROUP == 0) scales[index / GROUP] = bits;
}

__device__ __forceinline__ float int8_at(const uint4& packed, int j) {
    u32 word = j < 4 ? packed.x : j < 8 ? packed.y : j < 12 ? packed.z : packed.w;
    return (float)((int)(word << (3 - j % 4) * 8) >> 24);
}

// 새 토큰의 K, V를 cache에 더하고 attention을 센다. 블록은 머리 하나의 위치 CHUNK개를 맡는다. 머리마다 마지막에 끝난
// 블록이 부분 결과를 합친다. partial: [HEADS][SPLITS][HEAD_DIM + 2], done: [HEADS]는 늘 0으로 되돌려 놓는다.
extern "C" __global__ void __launch_bounds__(ATTENDERS) attend(
    const float* qkv, const float2* turns, const int* state, signed char* keys, u16* key_scales, signed char* values,
    u16* value_scales, float* partial, int* done, u16* act) {
    enum { LANES = HEAD_DIM / LANE, SPAN = LANES <= 2 ? 2 : LANES <= 4 ? 4 : LANES <= 8 ? 8 : 16,
           AT_ONCE = ATTENDERS / SPAN, STEPS = (CHUNK + AT_ONCE - 1) / AT_ONCE };
    __shared__ float query[HEAD_DIM], scores[CHUNK], sums[ATTENDERS / 32][HEAD_DIM];
    __shared__ __align__(16) signed char fresh_key[HEAD_DIM], fresh_value[HEAD_DIM];
    __shared__ u16 fresh_scales[2][HEAD_DIM / GROUP];
    __shared__ bool last;
    int head = blockIdx.x, begin = blockIdx.y * CHUNK, tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    int position = state[0];
    if (begin > position) return;
    int end = min(begin + CHUNK, position + 1), part = tid % SPAN, sub = tid / SPAN;
    size_t base = (size_t)head * CONTEXT * HEAD_DIM, fresh = base + (size_t)position * HEAD_DIM;

    // 지난 위치의 K와 V는 앞의 커널과 상관이 없으므로 먼저 읽는다.
    uint4 key[STEPS], value[STEPS];
    u16 key_scale[STEPS], value_scale[STEPS];
    bool present[STEPS];
    #pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int row = begin + sub + s * AT_ONCE;
        present[s] = part < LANES && row < end && sub + s * AT_ONCE < CHUNK;
        if (!present[s] || row == position) continue;
        size_t index = base + (size_t)row * HEAD_DIM + part * LANE;
        key[s] = __ldcg((const uint4*)(keys + index)), value[s] = __ldcg((const uint4*)(values + index));
        key_scale[s] = __ldcg(key_scales + index / GROUP), value_scale[s] = __ldcg(value_scales + index / GROUP);
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
    const float* source = qkv + head * 3 * HEAD_DIM;
    const float2* now = turns + (size_t)position * (ROTARY / 2);
    for (int d = tid; d < HEAD_DIM; d += ATTENDERS) {
        query[d] = rotate(source, now, d) * rsqrtf((float)HEAD_DIM);
        if (end == position + 1) {
            store_int8(fresh_key, fresh_scales[0], d, rotate(source + HEAD_DIM, now, d));
            store_int8(fresh_value, fresh_scales[1], d, source[2 * HEAD_DIM + d]);
        }
    }
    __syncthreads();
    if (end == position + 1 && tid < LANES) {
        size_t index = fresh + tid * LANE;
        *(uint4*)(keys + index) = ((const uint4*)fresh_key)[tid];
        *(uint4*)(values + index) = ((const uint4*)fresh_value)[tid];
        key_scales[index / GROUP] = fresh_scales[0][tid * LANE / GROUP];
        value_scales[index / GROUP] = fresh_scales[1][tid * LANE / GROUP];
    }

    float q[LANE], largest = -1e30f;
    #pragma unroll
    for (int j = 0; j < LANE; j++) q[j] = part < LANES ? query[part * LANE + j] : 0.f;
    #pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int row = begin + sub + s * AT_ONCE;
        if (present[s] && row == position) {
            key[s] = ((const uint4*)fresh_key)[part], value[s] = ((const uint4*)fresh_value)[part];
            key_scale[s] = fresh_scales[0][part * LANE / GROUP], value_scale[s] = fresh_scales[1][part * LANE / GROUP];
        }
        float dot = 0.f;
        if (present[s]) {
            #pragma unroll
            for (int j = 0; j < LANE; j++) dot += q[j] * int8_at(key[s], j);
            dot *= widen<false>(key_scale[s]);
        }
        for (int step = SPAN / 2; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
        if (part == 0 && sub + s * AT_ONCE < CHUNK) scores[sub + s * AT_ONCE] = row < end ? dot : -1e30f;
    }
    __syncthreads();
    for (int i = lane; i < CHUNK; i += 32) largest = fmaxf(largest, scores[i]);
    for (int step = 16; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    float total = 0.f;
    for (int i = lane; i < CHUNK; i += 32) total += expf(scores[i] - largest);
    for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);

    float sum[LANE] = {};
    #pragma unroll
    for (int s = 0; s < STEPS; s++) {
        if (!present[s]) continue;
        float weight = expf(scores[sub + s * AT_ONCE] - largest) * widen<false>(value_scale[s]);
        #pragma unroll
        for (int j = 0; j < LANE; j++) sum[j] += weight * int8_at(value[s], j);
    }
    #pragma unroll
    for (int j = 0; j < LANE; j++) {
        for (int step = SPAN; step < 32; step <<= 1) sum[j] += __shfl_xor_sync(~0u, sum[j], step);
        if (lane < LANES) sums[warp][lane * LANE + j] = sum[j];
    }
    __syncthreads();

    int active = position / CHUNK + 1;
    u16* out = act + FF + head * HEAD_DIM;
    float* mine = partial + ((size_t)head * SPLITS + blockIdx.y) * (HEAD_DIM + 2);
    for (int d = tid; d < HEAD_DIM; d += ATTENDERS) {
        float value = 0.f;
        for (int w = 0; w < ATTENDERS / 32; w++) value += sums[w][d];
        if (active == 1) store_split<ACT_BF16>(out + d, out + ACT + d, value / total);
        else mine[d] = value;
    }
    if (active == 1) return;
    if (tid == 0) mine[HEAD_DIM] = largest, mine[HEAD_DIM + 1] = total;
    __threadfence();
    __syncthreads();
    if (tid == 0) last = atomicAdd(done + head, 1) == active - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (tid == 0) done[head] = 0;
    const float* all = partial + (size_t)head * SPLITS * (HEAD_DIM + 2);
    float top = -1e30f, whole = 0.f;
    for (int s = 0; s < active; s++) top = fmaxf(top, __ldcg(all + s * (HEAD_DIM + 2) + HEAD_DIM));
    for (int s = 0; s < active; s++) {
        const float* one = all + s * (HEAD_DIM + 2) + HEAD_DIM;
        whole += __ldcg(one + 1) * expf(__ldcg(one) - top);
    }
    for (int d = tid; d < HEAD_DIM; d += ATTENDERS) {
        float value = 0.f;
        for (int s = 0; s < active; s++) {
            const float* one = all + s * (HEAD_DIM + 2);
            value += __ldcg(one + d) * expf(__ldcg(one + HEAD_DIM) - top);
        }
        store_split<ACT_BF16>(out + d, out + ACT + d, value / whole);
    }
}
