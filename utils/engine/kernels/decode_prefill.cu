// 질문을 읽을 때 쓰는 커널들. 행렬 곱은 decode_read.cu가, attention은 torch가 하고 여기서는 그 사이를 잇는다.

// 토큰마다의 norm. grid (T). in: fp32 [T][HIDDEN]. weight가 널이면 norm을 걸지 않는다. bias가 널이면 RMS norm이거나 bias가 없는 것이다.
//   residual이 널이면 out [T][HIDDEN] 16비트(ACT_BF16)에 IN_SCALE을 곱해 적고, 아니면 residual [T][HIDDEN] fp32에 더한다(POST_NORM).
extern "C" __global__ void __launch_bounds__(THREADS) normalize(const float* in, const float* weight, const float* bias,
                                                                u16* out, float* residual) {
    __shared__ float scratch[32];
    size_t at = (size_t)blockIdx.x * HIDDEN;
    float value[PER_THREAD], sum = 0.f, square = 0.f;
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        value[j] = i < HIDDEN ? in[at + i] : 0.f;
        sum += value[j];
    }
// 평균을 먼저 빼고 제곱을 모은다. 질문을 읽을 때는 시간이 넉넉하므로 두 번 동기화해도 된다
    float mean = RMS ? 0.f : block_sum(sum, scratch) / HIDDEN;
    for (int j = 0; j < PER_THREAD; j++)
        if (threadIdx.x + j * THREADS < HIDDEN) square += (value[j] - mean) * (value[j] - mean);
    float scale = rsqrtf(block_sum(square, scratch) / HIDDEN + EPS);
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        if (i >= HIDDEN) continue;
        float normal = weight ? (value[j] - mean) * scale * weight[i] + (bias ? bias[i] : 0.f) : value[j];
        if (residual) residual[at + i] += normal;
        else out[at + i] = narrow<ACT_BF16>(normal * IN_SCALE);
    }
}

// 줄 하나의 토큰들이 든 행. starts: 줄마다 시작하는 행과 마지막 줄이 끝나는 행. 널이면 줄마다 tokens개씩 이어져 있다.
struct LineTokens {
    int first, count;

    __device__ __forceinline__ LineTokens(const int* starts, int line, int tokens)
        : first(starts ? starts[line] : line * tokens), count(starts ? starts[line + 1] - starts[line] : tokens) {}
};

// qkv를 머리별로 나누어 norm하고 돌리고 cache에도 적는다. grid (줄의 수 x T, HEADS + KV_HEADS), 블록 SPLIT_THREADS.
//   qkv: 16비트 [모든 줄의 토큰][QDIM + 2 KVDIM], query: [줄][HEADS][T][HEAD_DIM], keys, values: [줄][KV_HEADS][total][HEAD_DIM]
//   pages: [줄][PAGES]. 줄마다 past번째 위치부터 온다
//   starts: `LineTokens`의 것. 줄의 끝을 채운 자리의 K, V는 0이다
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS) split_heads(
    const u16* qkv, Attention attention, u8* const* pages, const int* starts, int past, int tokens, int total, u16* query,
    u16* keys, u16* values) {
    __shared__ float raw[2][HEAD_DIM], scratch[32];
    int line = blockIdx.x / tokens, token = blockIdx.x % tokens, position = past + token, tid = threadIdx.x;
// 앞의 HEADS개 블록은 q 머리를, 나머지는 k와 v 머리를 맡는다
    bool is_query = blockIdx.y < HEADS;
    int head = is_query ? blockIdx.y : blockIdx.y - HEADS;
    if (position >= CONTEXT) return;  // 조각의 길이를 맞추느라 채운 자리
    LineTokens own(starts, line, tokens);
    if (token >= own.count) {
        for (int d = tid; d < HEAD_DIM && !is_query; d += SPLIT_THREADS) {
            size_t at = (((size_t)line * KV_HEADS + head) * total + position) * HEAD_DIM + d;
            keys[at] = values[at] = 0;
        }
        return;
    }
    const u16* source = qkv + (size_t)(own.first + token) * (QDIM + 2 * KVDIM);
    const float* weight = is_query ? attention.q_norm : attention.k_norm;
    float square = 0.f;
    for (int d = tid; d < HEAD_DIM; d += SPLIT_THREADS) {
        raw[0][d] = widen<BF16>(source[(is_query ? query_at(head) : key_at(head)) + d]);
        raw[1][d] = widen<BF16>(source[(is_query ? query_at(head) : value_at(head)) + d]);
        square += raw[0][d] * raw[0][d];
    }
// 머리마다의 norm. v에는 걸지 않는다
    float scale = weight ? rsqrtf(block_sum(square, scratch) / HEAD_DIM + EPS) : 1.f;
    for (int d = tid; d < HEAD_DIM; d += SPLIT_THREADS) raw[0][d] *= scale * (weight ? weight[d] : 1.f);
    __syncthreads();
    Page page(pages + (size_t)line * PAGES, position);
    const float2* turns = attention.turn < 0 ? 0 : page.turns(attention.turn);
    for (int d = tid; d < HEAD_DIM; d += SPLIT_THREADS) {
        float turned = rotate(raw[0], turn_of(turns, d), d);
        if (is_query) {
            query[(((size_t)line * HEADS + head) * tokens + token) * HEAD_DIM + d] = narrow<BF16>(turned);
            continue;
        }
// 이 조각의 attention은 16비트 K, V로 세고, 뒤의 토큰이 읽을 것은 int8로 적는다
        size_t at = (((size_t)line * KV_HEADS + head) * total + position) * HEAD_DIM + d;
        keys[at] = narrow<BF16>(turned);
        values[at] = narrow<BF16>(raw[1][d]);
        store_int8(page.values(0, attention.layer, head), page.scales(0, attention.layer, head), d, turned);
        store_int8(page.values(1, attention.layer, head), page.scales(1, attention.layer, head), d, raw[1][d]);
    }
}

// attention의 출력을 선형층의 입력으로 옮긴다. grid (줄의 수 x T), 블록 SPLIT_THREADS.
//   in: 16비트(BF16) [줄][HEADS][T][HEAD_DIM]. 줄, 머리, 토큰의 간격은 마음대로다
//   out: 16비트(ACT_BF16) [모든 줄의 토큰][QDIM]. IN_SCALE을 곱한다
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS) join_heads(const u16* in, int line_step, int head_step,
                                                                       int token_step, const int* starts, int tokens,
                                                                       u16* out) {
    int line = blockIdx.x / tokens, token = blockIdx.x % tokens;
    LineTokens own(starts, line, tokens);
    if (token >= own.count) return;
    for (int i = threadIdx.x; i < QDIM; i += SPLIT_THREADS) {
        u16 value = in[line * line_step + i / HEAD_DIM * head_step + token * token_step + i % HEAD_DIM];
        out[(size_t)(own.first + token) * QDIM + i] = narrow<ACT_BF16>(widen<BF16>(value) * IN_SCALE);
    }
}

// 앞 조각들의 K, V를 cache에서 푼다. grid (앞 조각들의 길이, KV_HEADS). keys, values: [KV_HEADS][total][HEAD_DIM].
extern "C" __global__ void read_cache(u8* const* pages, int layer, int total, u16* keys, u16* values) {
    Page page(pages, blockIdx.x);
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        size_t at = ((size_t)blockIdx.y * total + blockIdx.x) * HEAD_DIM + d;
        keys[at] = narrow<BF16>(page.values(0, layer, blockIdx.y)[d] *
                                widen<false>(page.scales(0, layer, blockIdx.y)[d / GROUP]));
        values[at] = narrow<BF16>(page.values(1, layer, blockIdx.y)[d] *
                                  widen<false>(page.scales(1, layer, blockIdx.y)[d / GROUP]));
    }
}

// MLP의 활성 함수. in: 16비트(BF16) [tokens][FF 또는 gate와 up 2 FF], out: 16비트(ACT_BF16) [tokens][FF], IN_SCALE을 곱한다.
extern "C" __global__ void activate_rows(const u16* in, u16* out, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const u16* source = in + (size_t)(i / FF) * FF * (GATED ? 2 : 1) + i % FF;
    float value = activate(widen<BF16>(*source));
    if (GATED) value *= widen<BF16>(source[FF]);
    out[i] = narrow<ACT_BF16>(value * IN_SCALE);
}
