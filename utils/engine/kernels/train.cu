// GPT-NeoX 한 층을 학습할 때 행렬 곱과 attention 사이에 있는 모든 계산. 한 thread가 16바이트(8개)를 다룬다.
// 컴파일할 때 정하는 상수: HIDDEN HEADS HEAD_DIM ROTARY RANK PADDED_RANK BF16
// PADDED_RANK는 RANK를 8의 배수로 올린 것이다. query_key_value의 입력은 [norm(x) | dropout(norm(x)) A^T]를 이어 붙인
// 폭 HIDDEN + PADDED_RANK이고, 가중치도 [W | scale * B]로 이어 붙여 LoRA가 행렬 곱 하나에 들어간다.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define VECTORS (HIDDEN / 8)
#define THREADS ((VECTORS + 31) / 32 * 32)
#define WARPS (THREADS / 32)
#define WIDE (HIDDEN + PADDED_RANK)
#define LOSS_THREADS 512

struct Eight { float v[8]; };

__device__ __forceinline__ float widen(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

__device__ __forceinline__ u16 narrow(float value) {
    u16 bits;
#if BF16
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    u32 word = __float_as_uint(value);
    bits = value == value ? (u16)((word + 0x7fff + ((word >> 16) & 1)) >> 16) : (u16)0x7fff;
#endif
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ Eight unpack(uint4 raw) {
    Eight out;
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.v[2 * i] = widen((u16)(words[i] & 0xffff));
        out.v[2 * i + 1] = widen((u16)(words[i] >> 16));
    }
    return out;
}

__device__ __forceinline__ uint4 pack(const Eight& in) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = (u32)narrow(in.v[2 * i]) | ((u32)narrow(in.v[2 * i + 1]) << 16);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ Eight load(const u16* at) { return unpack(*(const uint4*)at); }
__device__ __forceinline__ void store(u16* at, const Eight& value) { *(uint4*)at = pack(value); }

// 블록 전체의 합 N개. 모든 thread가 합을 받는다.
template <int N> __device__ __forceinline__ void sum_block(float (&values)[N]) {
    __shared__ float parts[N][32];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int step = 16; step; step >>= 1) values[n] += __shfl_xor_sync(0xffffffffu, values[n], step);
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int n = 0; n < N; n++) parts[n][threadIdx.x / 32] = values[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        float total = 0.f;
        for (int warp = 0; warp < WARPS; warp++) total += parts[n][warp];
        values[n] = total;
    }
    __syncthreads();
}

__device__ __forceinline__ u32 mix(u32 h) {
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    return h ^ (h >> 16);
}

// 블록의 씨앗, 층, 블록 안의 자리로 정해지는 난수로 8개의 값에 dropout을 건다. 16비트씩 쓴다.
__device__ __forceinline__ void drop(Eight& value, const int* keys, int row, int block_len, int layer, int column,
                                     int threshold, float scale) {
    if (threshold == 0) return;
    u32 low = mix((u32)keys[2 * (row / block_len)] ^ ((u32)layer * 0x9e3779b9u + 1u));
    u32 high = (u32)keys[2 * (row / block_len) + 1];
    u32 pair = (u32)(row % block_len) * (HIDDEN / 2) + column / 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 word = mix(mix(pair + i + low) ^ high);
        value.v[2 * i] *= (int)(word & 0xffff) >= threshold ? scale : 0.f;
        value.v[2 * i + 1] *= (int)(word >> 16) >= threshold ? scale : 0.f;
    }
}

// 행의 평균을 빼고 표준편차의 역수를 돌려준다.
__device__ __forceinline__ float standardize(Eight& x, bool active, float eps) {
    float sum[1] = {0.f};
#pragma unroll
    for (int i = 0; i < 8; i++) sum[0] += x.v[i];
    sum_block(sum);
    float mean = sum[0] / HIDDEN, square[1] = {0.f};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        x.v[i] -= mean;
        square[0] += active ? x.v[i] * x.v[i] : 0.f;
    }
    sum_block(square);
    float scale = rsqrtf(square[0] / HIDDEN + eps);
#pragma unroll
    for (int i = 0; i < 8; i++) x.v[i] *= scale;
    return scale;
}

__device__ __forceinline__ Eight affine(const Eight& x, const u16* weight, const u16* bias, int column) {
    Eight w = load(weight + column), b = load(bias + column), out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.v[i] = widen(narrow(x.v[i] * w.v[i] + b.v[i]));
    return out;
}

// 행 하나: 두 norm, LoRA의 아래쪽 곱 z = dropout(norm1) A^T, 잔차 x + 두 선형층의 bias.
extern "C" __global__ void __launch_bounds__(THREADS) norms_forward(
    const u16* x, const u16* w1, const u16* b1, const u16* w2, const u16* b2, const u16* bias, const float* lora_a,
    const int* keys, u16* n1, u16* n2, u16* residual, u16* z, int block_len, int layer, int threshold, float keep_scale,
    float eps) {
    size_t row = blockIdx.x;
    int column = threadIdx.x * 8;
    bool active = threadIdx.x < VECTORS;
    Eight value = {};
    if (active) value = load(x + row * HIDDEN + column);
    if (active && residual) {
        Eight b = load(bias + column), out;
#pragma unroll
        for (int i = 0; i < 8; i++) out.v[i] = value.v[i] + b.v[i];
        store(residual + row * HIDDEN + column, out);
    }
    standardize(value, active, eps);
    Eight dropped = {};
    if (active) {
        dropped = affine(value, w1, b1, column);
        store(n1 + row * WIDE + column, dropped);
        store(n2 + row * HIDDEN + column, affine(value, w2, b2, column));
        drop(dropped, keys, (int)row, block_len, layer, column, threshold, keep_scale);
    }
    for (int first = 0; first < PADDED_RANK; first += 8) {
        float dot[8] = {};
        if (active) {
#pragma unroll
            for (int r = 0; r < 8; r++) {
                if (first + r < RANK) {
                    const float4* a = (const float4*)(lora_a + (size_t)(first + r) * HIDDEN + column);
                    float4 p = a[0], q = a[1];
                    dot[r] = dropped.v[0] * p.x + dropped.v[1] * p.y + dropped.v[2] * p.z + dropped.v[3] * p.w +
                             dropped.v[4] * q.x + dropped.v[5] * q.y + dropped.v[6] * q.z + dropped.v[7] * q.w;
                }
            }
        }
        sum_block(dot);
        if (threadIdx.x == 0) {
            Eight out;
#pragma unroll
            for (int r = 0; r < 8; r++) out.v[r] = dot[r];
            store(n1 + row * WIDE + HIDDEN + first, out);
            store(z + row * PADDED_RANK + first, out);
        }
    }
}

// 행 하나: 두 norm과 LoRA 아래쪽의 backward, 잔차의 gradient까지 더한 dx와, A의 gradient에 쓸 dropout(norm1).
// gradient가 필요 없는 첫 층은 dx를 null로 부른다.
extern "C" __global__ void __launch_bounds__(THREADS) norms_backward(
    const u16* x, const u16* w1, const u16* b1, const u16* w2, const float* lora_a, const int* keys, const u16* dn1,
    const u16* dn2, u16* dx, u16* dropped_out, int block_len, int layer, int threshold, float keep_scale, float eps) {
    size_t row = blockIdx.x;
    int column = threadIdx.x * 8;
    bool active = threadIdx.x < VECTORS;
    Eight value = {};
    if (active) value = load(x + row * HIDDEN + column);
    float deviation = standardize(value, active, eps);
    if (active) {
        Eight dropped = affine(value, w1, b1, column);
        drop(dropped, keys, (int)row, block_len, layer, column, threshold, keep_scale);
        store(dropped_out + row * HIDDEN + column, dropped);
    }
    if (dx == nullptr) return;
    Eight gradient = {};
    float sums[2] = {0.f, 0.f};
    if (active) {
        for (int first = 0; first < PADDED_RANK; first += 8) {
            Eight dz = load(dn1 + row * WIDE + HIDDEN + first);
#pragma unroll
            for (int r = 0; r < 8; r++) {
                if (first + r < RANK) {
                    const float4* a = (const float4*)(lora_a + (size_t)(first + r) * HIDDEN + column);
                    float4 p = a[0], q = a[1];
                    float g = dz.v[r];
                    gradient.v[0] += g * p.x, gradient.v[1] += g * p.y, gradient.v[2] += g * p.z;
                    gradient.v[3] += g * p.w, gradient.v[4] += g * q.x, gradient.v[5] += g * q.y;
                    gradient.v[6] += g * q.z, gradient.v[7] += g * q.w;
                }
            }
        }
        drop(gradient, keys, (int)row, block_len, layer, column, threshold, keep_scale);
        Eight d1 = load(dn1 + row * WIDE + column), d2 = load(dn2 + row * HIDDEN + column);
        Eight s1 = load(w1 + column), s2 = load(w2 + column);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            gradient.v[i] = (gradient.v[i] + d1.v[i]) * s1.v[i] + d2.v[i] * s2.v[i];
            sums[0] += gradient.v[i];
            sums[1] += gradient.v[i] * value.v[i];
        }
    }
    sum_block(sums);
    if (active) {
        Eight out = load(dx + row * HIDDEN + column);
#pragma unroll
        for (int i = 0; i < 8; i++)
            out.v[i] += deviation * (gradient.v[i] - sums[0] / HIDDEN - value.v[i] * (sums[1] / HIDDEN));
        store(dx + row * HIDDEN + column, out);
    }
}

// NF4를 16비트로 푼다. absmax가 8비트로 한 번 더 양자화되어 있으면 함께 푼다. 출력 행의 폭은 stride다.
// count 뒤의 자리에서는 LoRA의 B를 scale을 곱해 행의 끝 PADDED_RANK 칸에 적는다.
// 한 thread가 네 곳을 맡아 읽기 넷을 한꺼번에 띄운다.
extern "C" __global__ void __launch_bounds__(256) dequantize(
    const u8* packed, const u8* absmax8, const float* absmax, const float* code, const float* offset,
    const float* levels, const float* lora_b, u16* out, int count, int columns, int stride, int extra, float scale) {
    __shared__ float table[16];
    int start = blockIdx.x * 1024 + threadIdx.x;
    u32 bytes[4];
    float top[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int index = start + i * 256;
        if (index < count) {
            bytes[i] = __ldcs((const u32*)packed + index);
            int block = index / 8;
            top[i] = absmax8 ? code[absmax8[block]] * absmax[block / 256] + *offset : absmax[block];
        }
    }
    if (threadIdx.x < 16) table[threadIdx.x] = levels[threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int index = start + i * 256;
        Eight value;
        size_t at = (size_t)index * 8;
        if (index < count) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 byte = (bytes[i] >> (8 * j)) & 0xff;
                value.v[2 * j] = table[byte >> 4] * top[i];
                value.v[2 * j + 1] = table[byte & 15] * top[i];
            }
            if (stride != columns) at += (size_t)(index / (columns / 8)) * (stride - columns);
        } else if (index < count + extra) {
            int row = (index - count) / (PADDED_RANK / 8), first = (index - count) % (PADDED_RANK / 8) * 8;
#pragma unroll
            for (int r = 0; r < 8; r++)
                value.v[r] = first + r < RANK ? lora_b[(size_t)row * RANK + first + r] * scale : 0.f;
            at = (size_t)row * stride + columns + first;
        } else {
            continue;
        }
        store(out + at, value);
    }
}

// [tokens, HEADS, 3, HEAD_DIM]의 q와 k를 제자리에서 돌린다. table은 [context, ROTARY]의 cos와 sin이다.
extern "C" __global__ void __launch_bounds__(256) rotate(u16* qkv, const long long* positions, const float* table,
                                                         int count) {
    int index = blockIdx.x * 256 + threadIdx.x;
    if (index >= count) return;
    const int half_vectors = ROTARY / 16;
    int lane = index % half_vectors * 8, part = index / half_vectors;
    int token = part / (2 * HEADS), head = part / 2 % HEADS;
    u16* at = qkv + (((size_t)token * HEADS + head) * 3 + part % 2) * HEAD_DIM + lane;
    const float* angle = table + (size_t)positions[token] * ROTARY + lane;
    Eight a = load(at), b = load(at + ROTARY / 2), first, second;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float c = angle[i], s = angle[ROTARY / 2 + i];
        first.v[i] = a.v[i] * c - b.v[i] * s;
        second.v[i] = b.v[i] * c + a.v[i] * s;
    }
    store(at, first);
    store(at + ROTARY / 2, second);
}

// attention의 dq, dk, dv([tokens, HEADS, HEAD_DIM])를 되돌려 [tokens, HEADS, 3, HEAD_DIM]으로 모은다.
extern "C" __global__ void __launch_bounds__(256) unrotate(const u16* dq, const u16* dk, const u16* dv, u16* dqkv,
                                                           const long long* positions, const float* table, int count) {
    int index = blockIdx.x * 256 + threadIdx.x;
    if (index >= count) return;
    const int vectors = HEAD_DIM / 8;
    int lane = index % vectors * 8, part = index / vectors;
    int kind = part % 3, head = part / 3 % HEADS, token = part / (3 * HEADS);
    const u16* from = (kind == 0 ? dq : kind == 1 ? dk : dv) + ((size_t)token * HEADS + head) * HEAD_DIM;
    Eight value = load(from + lane);
    if (kind < 2 && lane < ROTARY) {
        bool upper = lane >= ROTARY / 2;
        int pair = upper ? lane - ROTARY / 2 : lane;
        Eight other = load(from + (upper ? pair : pair + ROTARY / 2));
        const float* angle = table + (size_t)positions[token] * ROTARY + pair;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float c = angle[i], s = upper ? -angle[ROTARY / 2 + i] : angle[ROTARY / 2 + i];
            value.v[i] = value.v[i] * c + other.v[i] * s;
        }
    }
    store(dqkv + (size_t)part * HEAD_DIM + lane, value);
}

extern "C" __global__ void __launch_bounds__(256) gelu_forward(const u16* h, u16* out, int count) {
    int index = blockIdx.x * 256 + threadIdx.x;
    if (index >= count) return;
    Eight value = load(h + (size_t)index * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) value.v[i] *= 0.5f * (1.f + erff(value.v[i] * 0.70710678f));
    store(out + (size_t)index * 8, value);
}

extern "C" __global__ void __launch_bounds__(256) gelu_backward(const u16* h, u16* gradient, int count) {
    int index = blockIdx.x * 256 + threadIdx.x;
    if (index >= count) return;
    Eight value = load(h + (size_t)index * 8), d = load(gradient + (size_t)index * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float x = value.v[i];
        d.v[i] *= 0.5f * (1.f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    }
    store(gradient + (size_t)index * 8, d);
}

// 행 하나의 음의 로그 가능도. factor가 있으면 logits를 factor * (softmax - onehot)으로 덮어쓴다.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS) cross_entropy(u16* logits, const long long* targets,
                                                                        float* nll, const float* factor, int vocab) {
    __shared__ float tops[LOSS_THREADS / 32], sums[LOSS_THREADS / 32];
    u16* row = logits + (size_t)blockIdx.x * vocab;
    long long target = targets[blockIdx.x];
    int vectors = vocab / 8;
    if (target < 0) {
        if (threadIdx.x == 0) nll[blockIdx.x] = 0.f;
        if (factor)
            for (int at = threadIdx.x; at < vectors; at += LOSS_THREADS)
                ((uint4*)row)[at] = make_uint4(0, 0, 0, 0);
        return;
    }
    float top = -3.4e38f, sum = 0.f;
    for (int at = threadIdx.x; at < vectors; at += LOSS_THREADS) {
        Eight value = load(row + at * 8);
        float best = top;
#pragma unroll
        for (int i = 0; i < 8; i++) best = fmaxf(best, value.v[i]);
        sum *= __expf(top - best);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += __expf(value.v[i] - best);
        top = best;
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, top, step), weight = __shfl_xor_sync(0xffffffffu, sum, step);
        float best = fmaxf(top, other);
        sum = sum * __expf(top - best) + weight * __expf(other - best);
        top = best;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float best = tops[0], total = 0.f;
    for (int warp = 1; warp < LOSS_THREADS / 32; warp++) best = fmaxf(best, tops[warp]);
    for (int warp = 0; warp < LOSS_THREADS / 32; warp++) total += sums[warp] * __expf(tops[warp] - best);
    float log_sum = best + logf(total);
    if (threadIdx.x == 0) nll[blockIdx.x] = log_sum - widen(row[target]);
    if (factor == nullptr) return;
    __syncthreads();
    float scale = *factor;
    for (int at = threadIdx.x; at < vectors; at += LOSS_THREADS) {
        Eight value = load(row + at * 8);
#pragma unroll
        for (int i = 0; i < 8; i++)
            value.v[i] = scale * (__expf(value.v[i] - log_sum) - (at * 8 + i == target ? 1.f : 0.f));
        store(row + at * 8, value);
    }
}

// 표의 행을 모은다. 표는 핀 고정된 CPU 메모리에 있어도 된다.
extern "C" __global__ void __launch_bounds__(256) gather(const u16* table, const long long* ids, u16* out, int count) {
    int index = blockIdx.x * 256 + threadIdx.x;
    if (index >= count) return;
    int row = index / VECTORS, at = index % VECTORS;
    ((uint4*)out)[index] = ((const uint4*)table)[(size_t)ids[row] * VECTORS + at];
}
