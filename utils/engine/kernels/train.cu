// 학습할 때 한 층에서 행렬 곱과 attention 사이에 있는 모든 계산. 행렬은 모두 행 우선이고, 값은 16비트, 계산은 fp32다.
// 컴파일할 때 정하는 상수(train_kernels.py의 defines):
//   HIDDEN FF HEADS KV_HEADS HEAD_DIM ROTARY  크기       INTERLEAVED  q, k, v가 머리마다 번갈아 놓였는지
//   RMS EPS QK_NORM                           norm의 종류  GATED ACTIVATION  MLP의 종류(GELU_TANH, SILU, 나머지는 gelu)
//   LOGIT_SCALE LOGIT_CAP                     logits에 곱하는 수와 누르는 수      BF16  16비트의 종류
//   LORA_ROWS LORA_THREADS TILE_ROWS TILE_COLUMNS TILE_THREADS SUM_THREADS FLAT_THREADS HEADS_PER_BLOCK
//   LOSS_THREADS                              블록의 모양
//   SPAN                                      LoRA 커널이 한 번에 다루는 rank의 수

#define VECTORS (HIDDEN / 8)                       // 행 하나를 이루는 16바이트의 수
#define NORM_THREADS ((VECTORS + 31) / 32 * 32)    // norm은 행 하나를 블록 하나가, 16바이트 하나를 thread 하나가 맡는다

// ---- norm ----

// 행을 평균 0, 제곱평균 1로 만들고 (평균, 1/표준편차)를 돌려준다. RMSNorm은 평균을 빼지 않는다.
__device__ __forceinline__ float2 standardize(Eight& x, bool active) {
    float mean = 0.f;
#if !RMS
    float sum[1] = {0.f};
#pragma unroll
    for (int i = 0; i < 8; i++) sum[0] += x.v[i];
    sum_block<1, NORM_THREADS>(sum);
    mean = sum[0] / HIDDEN;
#pragma unroll
    for (int i = 0; i < 8; i++) x.v[i] -= mean;
#endif
    float square[1] = {0.f};
#pragma unroll
    for (int i = 0; i < 8; i++) square[0] += active ? x.v[i] * x.v[i] : 0.f;
    sum_block<1, NORM_THREADS>(square);
    float scale = rsqrtf(square[0] / HIDDEN + EPS);
#pragma unroll
    for (int i = 0; i < 8; i++) x.v[i] *= scale;
    return float2{mean, scale};
}

// 정규화한 값 8개에 norm의 weight를 곱하고 bias를 더한다. bias가 없으면(null) 0이다.
__device__ __forceinline__ Eight affine(const Eight& x, const float* weight, const float* bias, int column) {
    Eight w = load_float(weight + column, 1.f), b = load_float(bias ? bias + column : nullptr, 0.f), out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.v[i] = x.v[i] * w.v[i] + b.v[i];
    return out;
}

// 행 하나의 norm을 한 곳이나 두 곳(n2가 null이 아니면)에 적고, residual이 있으면 거기에 x + bias를 적는다.
// w1이 null이면 n1에 x를 그대로 적는다. stride는 출력 행의 폭(원소)이다. stats [tokens]에는 행의 (평균, 1/표준편차)를 적는다.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) norm_forward(
    const u16* x, const float* w1, const float* b1, u16* n1, int stride1, const float* w2, const float* b2, u16* n2,
    int stride2, u16* residual, const float* bias, float2* stats) {
    size_t row = blockIdx.x;
    int column = threadIdx.x * 8;
    bool active = threadIdx.x < VECTORS;
    Eight value = {};
    if (active) value = load(x + row * HIDDEN + column);
    if (active && residual) {
        Eight b = load_float(bias ? bias + column : nullptr, 0.f), out;
#pragma unroll
        for (int i = 0; i < 8; i++) out.v[i] = value.v[i] + b.v[i];
        store(residual + row * HIDDEN + column, out);
    }
    if (w1 == nullptr) {
        if (active) store(n1 + row * stride1 + column, value);
        return;
    }
    float2 found = standardize(value, active);
    if (stats && threadIdx.x == 0) stats[row] = found;
    if (!active) return;
    store(n1 + row * stride1 + column, affine(value, w1, b1, column));
    if (n2) store(n2 + row * stride2 + column, affine(value, w2, b2, column));
}

// 행 하나: out = x + norm(y). 출력에 norm을 거는 구조의 잔차. w와 b에 잔차의 배율이 들어 있다.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) post_norm(
    const u16* y, const float* w, const float* b, const u16* x, u16* out) {
    size_t at = (size_t)blockIdx.x * HIDDEN + threadIdx.x * 8;
    bool active = threadIdx.x < VECTORS;
    Eight value = {};
    if (active) value = load(y + at);
    standardize(value, active);
    if (!active) return;
    Eight normal = affine(value, w, b, threadIdx.x * 8), base = load(x + at);
#pragma unroll
    for (int i = 0; i < 8; i++) base.v[i] += normal.v[i];
    store(out + at, base);
}

// 행 하나: 한두 norm의 출력의 gradient를 x까지 되돌려 base(null이면 0)에 더한 것을 out에 적는다.
// n = (x - 평균) r, y = n w + b, g = dy w라 하면 dx = r (g - 평균(g) - n 평균(g n))이다. RMSNorm에는 평균(g)이 없다.
// 두 norm은 같은 n에서 나오므로 g를 먼저 더한다. w1이 null이면 norm이 없는 것이라 dy를 그대로 더한다.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) norm_backward(
    const u16* x, const float* w1, const u16* d1, int stride1, const float* w2, const u16* d2, int stride2,
    const u16* base, u16* out) {
    size_t row = blockIdx.x, at = row * HIDDEN + threadIdx.x * 8;
    int column = threadIdx.x * 8;
    bool active = threadIdx.x < VECTORS;
    Eight gradient = {}, total = {};
    if (active) {
        if (base) total = load(base + at);
        gradient = load(d1 + row * stride1 + column);
    }
    if (w1 == nullptr) {
        if (!active) return;
#pragma unroll
        for (int i = 0; i < 8; i++) total.v[i] += gradient.v[i];
        store(out + at, total);
        return;
    }
    Eight normal = {};
    if (active) normal = load(x + at);
    float scale = standardize(normal, active).y, sums[2] = {0.f, 0.f};
    if (active) {
        Eight w = load_float(w1 + column, 1.f);
#pragma unroll
        for (int i = 0; i < 8; i++) gradient.v[i] *= w.v[i];
        // 같은 x에 norm이 둘이면(GPT-NeoX의 병렬 잔차) 두 g를 더한다
        if (d2) {
            Eight other = load(d2 + row * stride2 + column), weight = load_float(w2 + column, 1.f);
#pragma unroll
            for (int i = 0; i < 8; i++) gradient.v[i] += other.v[i] * weight.v[i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sums[0] += gradient.v[i] * normal.v[i];
            sums[1] += gradient.v[i];
        }
    }
    sum_block<2, NORM_THREADS>(sums);
    if (!active) return;
    // along = 평균(g n), mean = 평균(g). base가 있으면 잔차를 타고 온 gradient에 더한다
    float along = sums[0] / HIDDEN, mean = RMS ? 0.f : sums[1] / HIDDEN;
#pragma unroll
    for (int i = 0; i < 8; i++) total.v[i] += scale * (gradient.v[i] - mean - normal.v[i] * along);
    store(out + at, total);
}

// ---- 머리: norm과 회전 ----

#define QKV_WIDTH ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
#if ROTARY % 8 == 0
#define WIDTH 4                          // 이웃한 네 값(8바이트)을 lane 하나가 맡는다. 짝이 되는 넷도 이웃해 있다
#else
#define WIDTH 2
#endif
#define PER_LANE ((HEAD_DIM / WIDTH + 31) / 32)
#define LIVE (QK_NORM ? HEAD_DIM : ROTARY)  // rotate가 고치는 칸. 제자리에서 돌리면 나머지는 그대로 둔다
#define HALF (ROTARY / 2)                // 앞쪽 반의 e와 뒤쪽 반의 e + HALF가 짝이 되어 돈다

// 행 안에서 q(part 0), k(1), v(2)의 머리가 시작하는 곳.
__device__ __forceinline__ int head_start(int part, int head) {
    if (INTERLEAVED) return (head * 3 + part) * HEAD_DIM;
    return (part == 0 ? head : part == 1 ? HEADS + head : HEADS + KV_HEADS + head) * HEAD_DIM;
}

__device__ __forceinline__ void load_lane(const u16* at, float (&value)[WIDTH]) {
#if WIDTH == 4
    unpack_four(*(const uint2*)at, value);
#else
    u32 raw = *(const u32*)at;
    value[0] = widen<BF16>((u16)(raw & 0xffff)), value[1] = widen<BF16>((u16)(raw >> 16));
#endif
}

__device__ __forceinline__ void store_lane(u16* at, const float (&value)[WIDTH]) {
#if WIDTH == 4
    *(uint2*)at = uint2{pack_two(value[0], value[1]), pack_two(value[2], value[3])};
#else
    *(u32*)at = pack_two(value[0], value[1]);
#endif
}

// 짝이 있는 자리. 돌리지 않는 칸은 자기 자신이다.
__device__ __forceinline__ int partner(int element) {
    if (element >= ROTARY) return element;
    return element < HALF ? element + HALF : element - HALF;
}

// 워프 하나가 머리 하나: norm(QK_NORM이면)을 걸고 자리만큼 돌린다. table [block, ROTARY]는 cos과 sin, null이면 돌리지 않는다.
//   앞쪽 y1 = x1 cos - x2 sin,  뒤쪽 y2 = x2 cos + x1 sin
// QK_NORM이면 qkv를 그대로 두고 qk [tokens, HEADS + KV_HEADS, HEAD_DIM]에, 아니면 qkv의 제자리에 적는다.
extern "C" __global__ void __launch_bounds__(32 * HEADS_PER_BLOCK) rotate(u16* qkv, u16* qk, const long long* positions,
                                                         const float* table, const float* wq, const float* wk,
                                                         int count) {
    int index = blockIdx.x * HEADS_PER_BLOCK + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (index >= count) return;
    int token = index / (HEADS + KV_HEADS), head = index % (HEADS + KV_HEADS);
    int part = head >= HEADS;
    u16* from = qkv + (size_t)token * QKV_WIDTH + head_start(part, part ? head - HEADS : head);
    // own은 lane이 맡은 칸, other는 그 짝이다. norm의 제곱합은 own에서만 센다
    float own[PER_LANE][WIDTH] = {}, other[PER_LANE][WIDTH] = {}, square = 0.f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int element = (lane + 32 * i) * WIDTH;
        if (element >= LIVE) continue;
        load_lane(from + element, own[i]);
        load_lane(from + partner(element), other[i]);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) square += own[i][j] * own[i][j];
    }
    u16* to = from;
    if (QK_NORM) {
        float scale = rsqrtf(sum_lanes(square) / HEAD_DIM + EPS);
        const float* weight = part ? wk : wq;
        to = qk + ((size_t)token * (HEADS + KV_HEADS) + head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int element = (lane + 32 * i) * WIDTH;
            if (element < HEAD_DIM) {
#pragma unroll
                for (int j = 0; j < WIDTH; j++) {
                    own[i][j] *= scale * weight[element + j];
                    other[i][j] *= scale * weight[partner(element) + j];
                }
            }
        }
    }
    __syncwarp();  // 제자리에서 돌리므로 모든 lane이 읽은 다음에 적는다
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int element = (lane + 32 * i) * WIDTH;
        if (element >= LIVE) continue;
        if (table && element < ROTARY) {
            bool upper = element >= HALF;
            const float* angle = table + (size_t)positions[token] * ROTARY + (upper ? element - HALF : element);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                // 앞쪽 반은 짝에 -sin을, 뒤쪽 반은 sin을 곱한다
                float sine = upper ? angle[HALF + j] : -angle[HALF + j];
                own[i][j] = own[i][j] * angle[j] + other[i][j] * sine;
            }
        }
        store_lane(to + element, own[i]);
    }
}

// 워프 하나가 머리 하나: attention의 gradient dq, dk, dv([tokens, 머리, HEAD_DIM])를 되돌려 qkv에 덮어쓴다.
// 회전의 backward는 반대쪽 회전이다: dx1 = dy1 cos + dy2 sin, dx2 = dy2 cos - dy1 sin.
// QK_NORM이면 qkv에 남아 있는 norm 앞의 값 x로 dx = r (g - n 평균(g n))까지 구한다(g = dy w, n = x r).
extern "C" __global__ void __launch_bounds__(32 * HEADS_PER_BLOCK) unrotate(const u16* dq, const u16* dk, const u16* dv, u16* qkv,
                                                           const long long* positions, const float* table,
                                                           const float* wq, const float* wk, int count) {
    int index = blockIdx.x * HEADS_PER_BLOCK + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (index >= count) return;
    // q, k, v의 gradient는 저마다 다른 텐서에 있고, q의 머리는 k, v보다 많을 수 있다
    const int heads = HEADS + 2 * KV_HEADS;
    int token = index / heads, head = index % heads;
    int part = head < HEADS ? 0 : head < HEADS + KV_HEADS ? 1 : 2;
    head -= part == 0 ? 0 : part == 1 ? HEADS : HEADS + KV_HEADS;
    const u16* from = (part == 0 ? dq + (size_t)token * HEADS * HEAD_DIM
                                 : (part == 1 ? dk : dv) + (size_t)token * KV_HEADS * HEAD_DIM) + head * HEAD_DIM;
    u16* to = qkv + (size_t)token * QKV_WIDTH + head_start(part, head);
    float value[PER_LANE][WIDTH] = {}, normal[PER_LANE][WIDTH] = {}, square = 0.f, along = 0.f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int element = (lane + 32 * i) * WIDTH;
        if (element >= HEAD_DIM) continue;
        load_lane(from + element, value[i]);
        if (part < 2 && table && element < ROTARY) {
            float other[WIDTH];
            load_lane(from + partner(element), other);
            bool upper = element >= HALF;
            const float* angle = table + (size_t)positions[token] * ROTARY + (upper ? element - HALF : element);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                // 각의 부호를 뒤집으면 반대쪽 회전이다
                float sine = upper ? -angle[HALF + j] : angle[HALF + j];
                value[i][j] = value[i][j] * angle[j] + other[j] * sine;
            }
        }
        if (QK_NORM && part < 2) {
            load_lane(to + element, normal[i]);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) square += normal[i][j] * normal[i][j];
        }
    }
    // 회전을 되돌린 gradient에서 머리마다의 norm까지 되돌린다. v에는 norm이 없다
    if (QK_NORM && part < 2) {
        const float* weight = part ? wk : wq;
        float scale = rsqrtf(sum_lanes(square) / HEAD_DIM + EPS);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int element = (lane + 32 * i) * WIDTH;
            if (element >= HEAD_DIM) continue;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                normal[i][j] *= scale;
                value[i][j] *= weight[element + j];
                along += value[i][j] * normal[i][j];
            }
        }
        along = sum_lanes(along) / HEAD_DIM;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) value[i][j] = scale * (value[i][j] - normal[i][j] * along);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int element = (lane + 32 * i) * WIDTH;
        if (element < HEAD_DIM) store_lane(to + element, value[i]);
    }
}

// ---- 활성 함수 ----

// act(x)와 그 기울기 act'(x).
__device__ __forceinline__ float2 activation(float x) {
    if (ACTIVATION == SILU) {  // silu: x s, s = 1 / (1 + e^-x)이고 기울기는 s (1 + x (1 - s))
        float s = 1.f / (1.f + expf(-x));
        return float2{x * s, s * (1.f + x * (1.f - s))};
    }
    if (ACTIVATION == GELU_TANH) {  // gelu의 tanh 근사: x (1 + t) / 2, t = tanh(k (x + 0.044715 x^3)), k = sqrt(2 / pi)
        const float k = 0.7978845608f;
        float t = bounded_tanh(k * (x + 0.044715f * x * x * x));
        float slope = 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * k * (1.f + 0.134145f * x * x);
        return float2{0.5f * x * (1.f + t), slope};
    }
    // gelu: x Phi(x), 기울기는 Phi(x) + x phi(x). Phi(-|x|) = e^(-x^2 / 2) (a1 t + ... + a5 t^5) / 2, t = 1 / (1 + p |x|)로
    // 어림한다(Abramowitz와 Stegun 7.1.26). erf의 오차는 1.5e-7이고, erff와 달리 phi와 지수 하나를 함께 쓴다
    float bell = expf(-0.5f * x * x), t = 1.f / (1.f + 0.23164189f * fabsf(x));
    float tail = bell * t * (0.12741480f + t * (-0.14224837f + t * (0.71070687f + t * (-0.72657601f + t * 0.53070271f))));
    float below = x < 0.f ? tail : 1.f - tail;
    return float2{x * below, below + x * 0.39894228f * bell};
}

#define FF_VECTORS (FF / 8)

// a = act(gate) * up 또는 act(h). h는 [tokens, FF](GATED면 [gate | up]으로 2 FF), out 행의 폭은 stride.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS) activate(const u16* h, u16* out, int stride, int count) {
    int index = blockIdx.x * FLAT_THREADS + threadIdx.x;
    if (index >= count) return;
    size_t row = index / FF_VECTORS;
    int column = index % FF_VECTORS * 8;
    const u16* at = h + row * (GATED ? 2 * FF : FF) + column;
    Eight value = load(at), up = {};
    if (GATED) up = load(at + FF);
#pragma unroll
    for (int i = 0; i < 8; i++) value.v[i] = activation(value.v[i]).x * (GATED ? up.v[i] : 1.f);
    store(out + row * stride + column, value);
}

// da(gradient의 앞 FF칸, 행의 폭 stride)를 h의 gradient로 바꾸어 h에 덮어쓴다.
// GATED면 dgate = da up act'(gate), dup = da act(gate)다.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS) activate_backward(u16* h, const u16* gradient, int stride, int count) {
    int index = blockIdx.x * FLAT_THREADS + threadIdx.x;
    if (index >= count) return;
    size_t row = index / FF_VECTORS;
    int column = index % FF_VECTORS * 8;
    u16* at = h + row * (GATED ? 2 * FF : FF) + column;
    Eight value = load(at), d = load(gradient + row * stride + column), up = {}, d_up;
    if (GATED) up = load(at + FF);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float2 act = activation(value.v[i]);
        value.v[i] = d.v[i] * act.y * (GATED ? up.v[i] : 1.f);
        d_up.v[i] = d.v[i] * act.x;
    }
    store(at, value);
    if (GATED) store(at + FF, d_up);
}

// ---- 손실과 embedding ----

// 구조가 logits에 하는 일: 곱하고, LOGIT_CAP이 있으면 cap tanh(x / cap)으로 누른다.
__device__ __forceinline__ float shape_logit(float x) {
    x *= LOGIT_SCALE;
    return LOGIT_CAP > 0.f ? LOGIT_CAP * bounded_tanh(x / LOGIT_CAP) : x;
}

// 행 하나의 음의 로그 가능도 log(sum e^l) - l[정답]. factor가 있으면 logits를 gradient로 덮어쓴다.
//   d/dx = factor (softmax(l) - onehot) * dl/dx,  dl/dx = LOGIT_SCALE (1 - (l / cap)^2)
// 행의 간격 stride는 8의 배수이고, vocab에서 거기까지는 아무것이나 들어 있다. 행을 두 번 읽는다. 처음에는 최댓값과 합을 함께 구한다(최댓값이 바뀌면 합에 e^(옛것 - 새것)을 곱한다).
extern "C" __global__ void __launch_bounds__(LOSS_THREADS) cross_entropy(u16* logits, const long long* targets,
                                                                        float* nll, const float* factor, int vocab,
                                                                        int stride) {
    __shared__ float tops[LOSS_THREADS / 32], sums[LOSS_THREADS / 32];
    u16* row = logits + (size_t)blockIdx.x * stride;
    long long target = targets[blockIdx.x];
    int vectors = stride / 8;
    if (target < 0) {  // 세지 않는 자리
        if (threadIdx.x == 0) nll[blockIdx.x] = 0.f;
        if (factor)
            for (int at = threadIdx.x; at < vectors; at += LOSS_THREADS) ((uint4*)row)[at] = uint4{0, 0, 0, 0};
        return;
    }
    // 첫 번째 읽기: thread마다의 최댓값 top과 sum e^(l - top)
    float top = -3.4e38f, sum = 0.f;
    for (int at = threadIdx.x; at < vectors; at += LOSS_THREADS) {
        Eight value = load(row + at * 8);
        float best = top;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            value.v[i] = at * 8 + i < vocab ? shape_logit(value.v[i]) : -3.4e38f;
            best = fmaxf(best, value.v[i]);
        }
        sum *= expf(top - best);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += expf(value.v[i] - best);
        top = best;
    }
    // 워프 안에서 (최댓값, 합)을 둘씩 합친다. 최댓값이 작은 쪽의 합은 그만큼 줄인다
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        float other = __shfl_xor_sync(~0u, top, step), weight = __shfl_xor_sync(~0u, sum, step);
        float best = fmaxf(top, other);
        sum = sum * expf(top - best) + weight * expf(other - best);
        top = best;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, sums[threadIdx.x / 32] = sum;
    __syncthreads();
    // 워프들의 (최댓값, 합)을 모아 log(sum e^l)을 구한다
    float best = tops[0], total = 0.f;
    for (int warp = 1; warp < LOSS_THREADS / 32; warp++) best = fmaxf(best, tops[warp]);
    for (int warp = 0; warp < LOSS_THREADS / 32; warp++) total += sums[warp] * expf(tops[warp] - best);
    float log_sum = best + logf(total);
    if (threadIdx.x == 0) nll[blockIdx.x] = log_sum - shape_logit(widen<BF16>(row[target]));
    if (factor == nullptr) return;
    __syncthreads();  // 정답의 logit을 읽은 다음에 덮어쓴다
    // 두 번째 읽기: softmax - onehot으로 덮어쓴다
    float scale = *factor;
    for (int at = threadIdx.x; at < vectors; at += LOSS_THREADS) {
        Eight value = load(row + at * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float logit = shape_logit(value.v[i]);
            // 누르기 cap tanh(x / cap)의 기울기는 1 - tanh^2이다
            float slope = LOGIT_CAP > 0.f ? 1.f - (logit / LOGIT_CAP) * (logit / LOGIT_CAP) : 1.f;
            float one = at * 8 + i == target ? 1.f : 0.f;
            value.v[i] = scale * LOGIT_SCALE * slope * (expf(logit - log_sum) - one);
        }
        store(row + at * 8, value);
    }
}

// 표 [vocab, HIDDEN]의 행을 모은다. 표는 핀 고정된 CPU 메모리에 있어도 된다(GPU가 PCIe로 읽는다).
extern "C" __global__ void __launch_bounds__(FLAT_THREADS) gather(const u16* table, const long long* ids, u16* out, int count) {
    int index = blockIdx.x * FLAT_THREADS + threadIdx.x;
    if (index >= count) return;
    int row = index / VECTORS, at = index % VECTORS;
    ((uint4*)out)[index] = ((const uint4*)table)[(size_t)ids[row] * VECTORS + at];
}
