// 토큰 하나의 층. 차례로 도는 층은 커널 다섯(project, attend, contract, project, contract), 병렬 잔차(GPT-NeoX)는
// 셋(project, attend, contract)이고 끝에 head가 온다. 커널마다 앞 커널을 기다리기 전에 가중치를 미리 읽는다.
//
// 잔차 x는 fp32 [HIDDEN]이다. 선형층의 입력은 위, 아래 두 16비트로 나누고 IN_SCALE을 곱해 둔다: gate * up처럼 큰 값이
// fp16의 범위(65,504)를 넘지 않게 한다. 곱한 뒤에 되돌린다.

#define PER_THREAD ((HIDDEN + THREADS - 1) / THREADS)
#define EARLY_NORM (PER_THREAD <= 10)  // norm의 weight를 레지스터에 미리 읽어 둘 만큼 좁은지

struct Norm {
    const float* weight;  // fp32 [HIDDEN]. 1을 더하는 구조(Gemma)면 더해 둔 것이다
    const float* bias;    // RMS norm이면 널
};

// 블록의 스레드들이 나누어 쥔 벡터 [HIDDEN].
struct Row {
    float v[PER_THREAD];

// j번째로 맡은 칸이 벡터 안에 있는지. 마지막 것만 빼면 컴파일할 때 안다
    __device__ __forceinline__ static bool has(int j) {
        return (j + 1) * THREADS <= HIDDEN || threadIdx.x + j * THREADS < HIDDEN;
    }

// 앞 커널이 적은 값은 L1을 거치지 않고 읽는다(ldcg). 다른 SM이 적은 것이라 L1에는 옛 값이 있을 수 있다.
    __device__ __forceinline__ void load(const float* source) {
        #pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            int i = threadIdx.x + j * THREADS;
            v[j] = source && has(j) ? __ldcg(source + i) : 0.f;
        }
    }
// 가중치는 바뀌지 않으므로 읽기 전용 캐시로 읽는다(ldg).
    __device__ __forceinline__ void load_constant(const float* source) {
        #pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            int i = threadIdx.x + j * THREADS;
            v[j] = source && has(j) ? __ldg(source + i) : 0.f;
        }
    }
};

__device__ __forceinline__ void load_norm(const Norm& norm, Row& weight, Row& bias) {
    weight.load_constant(norm.weight);
    if (!RMS) bias.load_constant(norm.bias);
}

// (평균, 표준편차의 역수). RMS norm이면 평균은 0이다. 합과 제곱합을 함께 모아 동기화가 한 번이다. scratch: [WARPS].
__device__ __forceinline__ float2 moments(const Row& row, float2* scratch) {
    float2 sum = {0.f, 0.f};
    #pragma unroll
    for (int j = 0; j < PER_THREAD; j++) sum.x += row.v[j], sum.y += row.v[j] * row.v[j];
    sum.x = warp_sum(sum.x), sum.y = warp_sum(sum.y);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = scratch[threadIdx.x & WARPS - 1];
    for (int step = WARPS / 2; step; step >>= 1)
        sum.x += __shfl_xor_sync(~0u, sum.x, step), sum.y += __shfl_xor_sync(~0u, sum.y, step);
    float mean = RMS ? 0.f : sum.x / HIDDEN;
    return {mean, rsqrtf(fmaxf(sum.y / HIDDEN - mean * mean, 0.f) + EPS)};
}

// 잔차를 읽어 norm한 것을 위, 아래로 적는다. 앞 선형층의 출력에 norm을 거는 구조(POST_NORM)에서는 아직 더하지 않은 그
// 출력 y에 norm을 걸어 더하고, 첫 블록이 새 잔차를 x_out에 적는다(다른 블록이 읽고 있는 x와 다른 자리다).
struct Residual {
    const float* x;
    const float* y;     // 널이면 더할 것이 없다
    const float* post;  // y의 norm의 weight. 잔차의 배율을 곱해 둔 것이다
    float* x_out;
};

template <bool BF, bool NORMED>
__device__ __forceinline__ void read_residual(const Residual& from, const Norm& norm, Row& weight, Row& bias,
                                              float scale, u16* high, float2* scratch) {
    Row x;
    x.load(from.x);
    if (POST_NORM) {
        if (from.y) {
            Row y, post;
            y.load(from.y);
            post.load_constant(from.post);
// 앞 선형층의 출력에 거는 norm: x += y / rms(y) * post
            float factor = moments(y, scratch).y;
            #pragma unroll
            for (int j = 0; j < PER_THREAD; j++) x.v[j] += y.v[j] * factor * post.v[j];
        }
        for (int j = 0; j < PER_THREAD; j++) {
            int i = threadIdx.x + j * THREADS;
            if (from.x_out && blockIdx.x == 0 && Row::has(j)) from.x_out[i] = x.v[j];
        }
    }
    if (NORMED && !EARLY_NORM) load_norm(norm, weight, bias);
// 이 선형층의 입력에 거는 norm. 두 moments는 scratch의 다른 자리를 쓰므로 사이에 동기화가 없어도 된다
    float2 moment = NORMED ? moments(x, scratch + WARPS) : float2{0.f, 1.f};
    #pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
        int i = threadIdx.x + j * THREADS;
        if (!Row::has(j)) continue;
        float value = NORMED ? (x.v[j] - moment.x) * moment.y * weight.v[j] : x.v[j];
        if (NORMED && !RMS) value += bias.v[j];
        store_split<BF>(high + i, high + HIDDEN + i, value * scale);
    }
}

__device__ __forceinline__ float activate(float value) {
// 어느 것인지는 컴파일할 때 정해지므로 나머지 가지는 사라진다
    if (ACTIVATION == SILU) return value / (1.f + expf(-value));
    if (ACTIVATION == GELU_TANH)
        return 0.5f * value * (1.f + tanhf(0.7978845608f * (value + 0.044715f * value * value * value)));
    return 0.5f * value * (1.f + erff(value * 0.70710678f));
}

// MLP의 뒤쪽 행렬에 붙은 LoRA의 아래쪽 곱 d = A act. A [r][FF]는 블록마다 읽기에는 넓다. 그래서 act를 만든 블록이 제
// 행들의 몫을 partial[블록][RANK]에 적고, 다음 커널이 블록들의 몫을 더한다. 더하는 차례가 정해져 있어 답은 늘 같다.
struct LoraOfAct {
    const float* a;  // fp32 [RANK][FF]. 없으면 널
    float* partial;  // [MLP_BLOCKS][RANK]
    float scale;     // LoRA의 배율
};

// 워프 하나가 d의 행 PER_WARP개를 맡는다. 읽는 것은 앞 커널과 상관없거나 다른 읽기와 겹칠 수 있으므로 먼저 시작한다.
struct LoraOfActGiver {
    enum { PER_WARP = (RANK + WARPS - 1) / WARPS, PER_LANE = (MLP_ROWS + 31) / 32, HELD = PER_WARP * PER_LANE,
           EARLY = HELD > 0 && HELD <= 8 };
    float held[EARLY ? HELD : 1];

    __device__ __forceinline__ static float weight(const LoraOfAct& lora, int k, int first, int rows) {
        int r = (threadIdx.x >> 5) + k / PER_LANE * WARPS, i = (threadIdx.x & 31) + k % PER_LANE * 32;
        return r < RANK && i < rows ? __ldg(lora.a + (size_t)r * FF + first + i) : 0.f;
    }
    __device__ __forceinline__ void prime(const LoraOfAct& lora, int first, int rows) {
        #pragma unroll
        for (int k = 0; k < HELD; k++)
            if (EARLY) held[EARLY ? k : 0] = weight(lora, k, first, rows);
    }
    // act: 이 블록이 만든 값 [rows](공유 메모리), first: 첫 행.
    __device__ __forceinline__ void give(const LoraOfAct& lora, const float* act, int first, int rows,
                                         int block) const {
        #pragma unroll
        for (int w = 0; w < PER_WARP; w++) {
            int r = (threadIdx.x >> 5) + w * WARPS;
            float sum = 0.f;
            #pragma unroll
            for (int l = 0; l < PER_LANE; l++) {
                int i = (threadIdx.x & 31) + l * 32, k = w * PER_LANE + l;
                if (i < rows) sum += (EARLY ? held[EARLY ? k : 0] : weight(lora, k, first, rows)) * act[i];
            }
            sum = warp_sum(sum);
            if ((threadIdx.x & 31) == 0 && r < RANK) lora.partial[block * RANK + r] = sum * lora.scale;
        }
    }
};

struct LoraOfActTaker {
    enum { PER_WARP = (RANK + WARPS - 1) / WARPS, PER_LANE = (MLP_BLOCKS + 31) / 32 };
    float held[PER_WARP ? PER_WARP : 1][PER_LANE];

// 범위를 넘는 자리도 가까운 것을 읽어 두고 버린다: 읽을지를 따지면 하나씩 기다린다
    __device__ __forceinline__ void load(const LoraOfAct& lora) {
        #pragma unroll
        for (int i = 0; i < PER_WARP * PER_LANE; i++) {
            int r = (threadIdx.x >> 5) + i / PER_LANE * WARPS, b = (threadIdx.x & 31) + i % PER_LANE * 32;
            held[i / PER_LANE][i % PER_LANE] = __ldcg(lora.partial + min(b, MLP_BLOCKS - 1) * RANK + min(r, RANK - 1));
        }
    }
    // d [RANK]를 공유 메모리에 적는다. 그 뒤에 동기화해야 한다.
    __device__ __forceinline__ void take(float adapter, float* down) const {
        #pragma unroll
        for (int w = 0; w < PER_WARP; w++) {
            int r = (threadIdx.x >> 5) + w * WARPS;
            float sum = 0.f;
            #pragma unroll
            for (int l = 0; l < PER_LANE; l++)
                if ((threadIdx.x & 31) + l * 32 < MLP_BLOCKS) sum += held[w][l];
            sum = warp_sum(sum);
            if ((threadIdx.x & 31) == 0 && r < RANK) down[r] = sum * adapter;
        }
    }
};

// 커널의 공유 메모리. 자리는 decode_space.py가, 크기는 decode_plan.py가 세어 -D로 준다.
//   표 TABLE_BYTES | 8비트 코드표 256 | LoRA의 d [3][RANK를 4의 배수로] | LoRA의 합의 자리 [lora_tiles][WARPS][ROWS]
//   | 합의 자리 [slots][WARPS][ROWS] | 나머지
struct Space {
    enum { DOWN = LORA_DOWN };
    float* codes;
    float* down;
    float* lora_partial;
    float* partial;
    char* rest;
    float code_value;

    __device__ __forceinline__ Space(int lora_tiles, int slots, const float* code) {
        code_value = DOUBLE_QUANT && threadIdx.x < 256 ? __ldg(code + threadIdx.x) : 0.f;
        codes = (float*)(space_begin() + TABLE_BYTES);
        down = codes + (DOWN_AT - TABLE_BYTES) / 4;
        lora_partial = down + (SUMS_AT - DOWN_AT) / 4;
        partial = lora_partial + lora_tiles * (SLOT_BYTES / 4);
        rest = (char*)(partial + slots * (SLOT_BYTES / 4));
    }
    __device__ __forceinline__ void fill() const {
        if (WEIGHT == NF4_WEIGHT) build_table<THREADS>((u32*)space_begin());
        if (DOUBLE_QUANT && threadIdx.x < 256) codes[threadIdx.x] = code_value;
    }
};

// q, k, v를 곱하는 커널이 이어서 세는 attention. 볼 위치가 적을 때 쓴다. 커널 하나를 덜 시작하고, 병렬 잔차면 MLP의
// 블록들이 아직 곱하는 동안에 센다.
struct Attend {
    Attention attention;
    u8* const* pages;  // 널이면 세지 않는다
    const int* state;
    int* done;  // [2][KV_HEADS]. 머리 묶음마다 다 곱한 묶음(tile)의 수와, 그것을 다 기다린 q 머리의 수. 늘 0으로 되돌려 놓는다
    u16* out;   // 16비트 [위, 아래][QDIM]

    // 블록이 first부터 tiles개 묶음(모두 한 머리의 것이다)의 출력을 적은 다음에 부른다. q 머리마다 그 첫 묶음을 곱한 블록이
    // 머리 묶음의 나머지를 기다려 attention을 센다. 블록이 SM보다 많지 않아 모두 돌고 있으므로 기다림은 끝난다.
    __device__ __forceinline__ void follow(int first, int tiles, u8* first_page, int position,
                                           const float* qkv) const {
        int *ready = done + HeadGroup::of(first), *taken = ready + KV_HEADS, head = HeadGroup::query_of(first);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(ready, tiles);
        }
        if (head < 0) return;
        auto wait = [&] {
            if (threadIdx.x == 0) {
                wait_until(ready, HeadGroup::TILES);
                if (atomicAdd(taken, 1) == PER_KV - 1) *ready = *taken = 0;
            }
            __syncthreads();
        };
        attend_job<THREADS, 1, false>(*(AttendSpace<THREADS, 1>*)shared, qkv, attention, pages, first_page, position, head,
                                      0, 1, false, 0, 0, out, wait);
    }
};

// 선형층 하나(또는 나란한 여럿)를 곱한다. block은 이 선형층을 맡은 블록들 가운데의 번호다.
//   MLP = false: out[행] = W norm(x), 행은 q | k | v.  MLP = true: act[행] = 활성(gate) * up 또는 활성(up), 16비트 둘.
template <bool MLP>
__device__ __forceinline__ void project_job(const Residual& from, const Norm& norm, const Linear& linear,
                                            const LoraOfAct& next_lora, const float* code, float adapter, int block,
                                            int blocks, int slots, float* out, u16* act, const Attend& attend) {
    enum { PAIR = MLP && GATED ? 2 : 1, PARTS = MLP ? PAIR : QKV_PARTS,
           TILES = MLP ? FF / ROWS : (QDIM + 2 * KVDIM) / ROWS };
    typedef typename Choose<PARTS == 2, GateAndUp, OneMatrix>::Type OneOrTwo;
    typedef typename Choose<PARTS == 3, QkvMatrices, OneOrTwo>::Type Where;
    typedef Product<Piece<HIDDEN>, HIDDEN, MLP ? MLP_TILES : QKV_TILES, PIECES_AHEAD, Where> Main;
// 1. 기다리기 전: 가중치, LoRA의 A와 B, bias, norm의 weight를 미리 읽는다. 앞 커널과 상관이 없는 것들이다. 여기서 쓸 작은 것은
// 가중치보다 먼저 읽기 시작한다. 나중에 읽으면 앞서 청한 가중치가 다 온 다음에야 온다
    int first = TILES * block / blocks, tiles = TILES * (block + 1) / blocks - first;
    Space space(PARTS * LORA_TILES, slots, code);
    bool attends = !MLP && attend.pages;  // 층 0은 앞 커널과 겹쳐 시작하지 않으므로 state를 지금 읽어도 된다
    int position = attends ? attend.state[0] : 0;
    u8* first_page = attends ? attend.pages[0] : 0;
    Row weight, bias;
    if (PRE_NORM && EARLY_NORM) load_norm(norm, weight, bias);
    Main product(linear.part, first * PAIR, tiles * PAIR);
    product.prime();
    // 이 블록의 행들이 쓰는 part만 LoRA를 센다. gate와 up은 늘 함께 쓴다
// 어댑터를 끄면 *adapter가 0이고, 센 d에 그것을 곱한다. 끈 것을 알아 건너뛰려면 그 값이 오기를 커널마다 기다려야 한다
    bool adapted = RANK && linear.lora_a.weight;
    int part_begin = MLP ? 0 : Where::part(first), part_end = MLP ? PARTS : Where::part(first + tiles - 1) + 1;
    LoraDown<HIDDEN> lora(&linear.lora_a, part_begin * LORA_TILES, adapted ? (part_end - part_begin) * LORA_TILES : 0);
    if (adapted) lora.prime();
    float2* scratch = (float2*)space.rest;
    u16* high = (u16*)(scratch + 2 * WARPS);
    int row = first * ROWS + threadIdx.x;
    bool has_row = threadIdx.x < tiles * ROWS;
    RowEnd end, up_end;
    if (has_row) end.load(linear, row, adapted);
    if (has_row && PAIR == 2) up_end.load(linear, FF + row, adapted);
    bool gives = MLP && RANK && next_lora.a;
    LoraOfActGiver giver;
    if (gives) giver.prime(next_lora, first * ROWS, tiles * ROWS);
    space.fill();
    if (attends) prefetch_cache(attend.attention, first_page, position, block, blocks);
// 2. 앞 커널이 끝나면 잔차를 읽어 norm한다. 블록마다 똑같이 센다: 나누어 세고 모으는 것보다 빠르다
    wait_for_previous_kernel();
    read_residual<ACT_BF16, PRE_NORM>(from, norm, weight, bias, IN_SCALE, high, scratch);
    __syncthreads();

// 활성값의 위와 아래 절반, NF4의 표, 8비트 코드표
    Inputs inputs = {high, high + HIDDEN, space.codes};
// 3. 곱한다. 워프마다의 합은 공유 메모리에 있고, 동기화한 뒤에 행마다 더한다
    if (adapted) lora.run(inputs, space.lora_partial);
    product.run(inputs, space.partial);
    __syncthreads();
    if (adapted) {
        for (int part = part_begin; part < part_end; part++)
            gather_lora<HIDDEN>(space.lora_partial + (part - part_begin) * LORA_TILES * LoraDown<HIDDEN>::FLOATS,
                                adapter, space.down + part * Space::DOWN);
        __syncthreads();
    }
    const float* down = adapted ? space.down : 0;
// 4. 출력 행 하나를 스레드 하나가 마무리한다
    if (!MLP) {
        if (has_row) {
            int part = Where::part(row / ROWS);
            out[row] = end.finish(linear, Main::row(space.partial, threadIdx.x), down ? down + part * Space::DOWN : 0,
                                  row);
        }
        if (attends) attend.follow(first, tiles, first_page, position, out);
        return;
    }
    // gate와 up의 묶음이 번갈아 있으므로 i번째 gate 묶음은 2i번째, up 묶음은 2i + 1번째다.
// 출력 행 threadIdx.x는 tile번째 gate 묶음의 inside번째 행이다
    int tile = threadIdx.x / ROWS, inside = threadIdx.x % ROWS;
    float value = 0.f;
    if (has_row) {
        value = activate(end.finish(linear, Main::row(space.partial, tile * PAIR * ROWS + inside), down, row));
        if (PAIR == 2)
            value *= up_end.finish(linear, Main::row(space.partial, (tile * 2 + 1) * ROWS + inside),
                                   down ? down + Space::DOWN : 0, FF + row);
        store_split<ACT_BF16>(act + row, act + FF + row, value * IN_SCALE);
    }
    if (!gives) return;
// 5. 다음 커널(contract)의 LoRA가 쓸 몫을 여기서 센다. act가 아직 fp32로 공유 메모리에 들어갈 수 있을 때다
    float* values = (float*)high;  // 입력은 다 썼다
    if (has_row) values[threadIdx.x] = value;
    __syncthreads();
    giver.give(next_lora, values, first * ROWS, tiles * ROWS, block);
}

// qkv 또는 MLP의 앞쪽, 병렬 잔차면 둘 다. 앞의 qkv_blocks개 블록이 qkv를 맡는다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) project(
    Residual from, Norm norm1, Linear qkv, Norm norm2, Linear mlp, LoraOfAct down_lora, const float* code,
    const float* adapter, int qkv_blocks, int slots, float* out, u16* act, Attend attend) {
    let_next_kernel_start();
    if ((int)blockIdx.x < qkv_blocks)
        project_job<false>(from, norm1, qkv, down_lora, code, *adapter, blockIdx.x, qkv_blocks, slots, out, act,
                           attend);
    else
        project_job<true>(from, norm2, mlp, down_lora, code, *adapter, blockIdx.x - qkv_blocks, gridDim.x - qkv_blocks,
                          slots, out, act, attend);
}

// 앞 커널이 적은 16비트 N개를 공유 메모리로 옮긴다. 다 읽기 시작한 다음에 적는다. 많으면 나머지는 적으면서 읽는다.
template <int N> struct CopyIn {
    enum { PARTS = N / 8, TURNS = (PARTS + THREADS - 1) / THREADS, HELD = TURNS < 4 ? TURNS : 4 };
    uint4 held[HELD];

    __device__ __forceinline__ static int place(int turn) { return threadIdx.x + turn * THREADS; }
    __device__ __forceinline__ void load(const u16* from, int turn = 0) {
        #pragma unroll
        for (int k = 0; k < HELD; k++) held[k] = __ldcg((const uint4*)from + min(place(turn + k), PARTS - 1));
    }
    __device__ __forceinline__ void store(const u16* from, u16* to) {
        #pragma unroll
        for (int turn = 0; turn < TURNS; turn += HELD) {
            if (turn) load(from, turn);
            #pragma unroll
            for (int k = 0; k < HELD; k++)
                if ((turn + k + 1) * THREADS <= PARTS || place(turn + k) < PARTS)
                    ((uint4*)to)[place(turn + k)] = held[k];
        }
    }
};

// 잔차에 더하는 선형층: attention의 출력 W_o, MLP의 출력 W_down, 병렬 잔차면 둘 다.
//   x: 잔차 [HIDDEN]. POST_NORM이면 더하지 않고 y에 적는다.
//   입력은 위 절반만 쓴다(16비트 가중치는 아래 절반도): 공유 메모리를 아낀다.
template <bool OUT, bool DOWN>
__device__ __forceinline__ void contract_job(float* x, float* y, const u16* attended, const u16* act, const float* code,
                                             float adapter, const Linear& out, const Linear& down,
                                             const LoraOfAct& down_lora, int slots) {
    typedef Product<Piece<QDIM>, QDIM, OUT_TILES, OUT_AHEAD> Out;
    typedef Product<Piece<FF>, FF, DOWN_TILES, PIECES_AHEAD> Down;
    enum { LOW = WEIGHT == WIDE_WEIGHT, COPIES = LOW ? 2 : 1 };
    int first = HIDDEN / ROWS * blockIdx.x / gridDim.x, tiles = HIDDEN / ROWS * (blockIdx.x + 1) / gridDim.x - first;
// 1. 기다리기 전: 두 선형층의 가중치와 행의 마무리에 쓸 것을 미리 읽는다
    Space space(OUT ? LORA_TILES : 0, slots * (OUT + DOWN), code);
    Down down_product(down.part, first, DOWN ? tiles : 0);
    Out out_product(out.part, first, OUT ? tiles : 0);
    if (DOWN) down_product.prime();
    if (OUT) out_product.prime();
    bool out_adapted = OUT && RANK && out.lora_a.weight;
    bool down_adapted = DOWN && RANK && down_lora.a;
    LoraDown<QDIM> lora(&out.lora_a, 0, out_adapted ? LORA_TILES : 0);
    if (out_adapted) lora.prime();
    float* down_partial = space.partial + (OUT ? slots * WARPS * ROWS : 0);
    u16* inputs = (u16*)space.rest;
// 두 선형층의 입력이 차례로 놓인다
    u16* acts = inputs + (OUT ? QDIM * COPIES : 0);
    int row = first * ROWS + threadIdx.x;
    bool has_row = threadIdx.x < tiles * ROWS;
    RowEnd out_end, down_end;
    if (has_row && OUT) out_end.load(out, row, out_adapted);
    if (has_row && DOWN) down_end.load(down, row, down_adapted);
    space.fill();
    wait_for_previous_kernel();
// 2. 앞 커널이 적은 활성값을 공유 메모리로 옮긴다. LoRA의 몫도 함께 읽기 시작해서 기다림을 겹친다
    LoraOfActTaker taker;
    if (down_adapted) taker.load(down_lora);
    CopyIn<QDIM * COPIES> out_copy;
    CopyIn<FF * COPIES> down_copy;
    if (OUT) out_copy.load(attended);
    if (DOWN) down_copy.load(act);
    float value = has_row && !POST_NORM ? __ldcg(x + row) : 0.f;
    if (OUT) out_copy.store(attended, inputs);
    if (DOWN) down_copy.store(act, acts);
    if (down_adapted) taker.take(adapter, space.down + Space::DOWN);
    __syncthreads();

    Inputs out_inputs = {inputs, LOW ? inputs + QDIM : 0, space.codes};
    Inputs down_inputs = {acts, LOW ? acts + FF : 0, space.codes};
// 3. 곱한다
    if (out_adapted) lora.run(out_inputs, space.lora_partial);
    if (DOWN) down_product.run(down_inputs, down_partial);
    if (OUT) out_product.run(out_inputs, space.partial);
    __syncthreads();
    if (out_adapted) {
        gather_lora<QDIM>(space.lora_partial, adapter, space.down);
        __syncthreads();
    }
    if (!has_row) return;
// 4. 행마다 더해 잔차를 고친다. 블록마다 다른 행이므로 서로 부딪치지 않는다
    float sum = 0.f;
    if (OUT) sum += out_end.finish(out, Out::row(space.partial, threadIdx.x), out_adapted ? space.down : 0, row);
    if (DOWN)
        sum += down_end.finish(down, Down::row(down_partial, threadIdx.x), down_adapted ? space.down + Space::DOWN : 0,
                               row);
    if (POST_NORM) y[row] = sum;
    else x[row] = value + sum * RESIDUAL_SCALE;
}

#define CONTRACT(NAME, OUT, DOWN)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(                                              \
        float* x, float* y, const u16* attended, const u16* act, const float* code, const float* adapter, Linear out,  \
        Linear down, LoraOfAct down_lora, int slots) {                                                                 \
        let_next_kernel_start();                                                                                       \
        contract_job<OUT, DOWN>(x, y, attended, act, code, *adapter, out, down, down_lora, slots);                     \
    }
#if PARALLEL
CONTRACT(contract, true, true)
#else
CONTRACT(contract_attention, true, false)
CONTRACT(contract_mlp, false, true)
#endif

// logits[:VOCAB] = W norm(x) * LOGIT_SCALE, 한계가 있으면 tanh로 누른다. weight의 행은 16의 배수까지 있다.
extern "C" __global__ void __launch_bounds__(THREADS, 1) head(Residual from, Norm norm, Linear linear, float* logits,
                                                              int slots) {
    typedef Product<WidePiece<BF16, HIDDEN>, HIDDEN, HEAD_TILES, 4> Main;
    enum { TILES = (VOCAB + ROWS - 1) / ROWS };
    let_next_kernel_start();
// 어휘가 크면 블록이 SM보다 많다. 출력 행렬은 16비트라 NF4의 표가 필요 없다
    int first = (int)((u64)TILES * blockIdx.x / gridDim.x);
    int tiles = (int)((u64)TILES * (blockIdx.x + 1) / gridDim.x) - first;
    Row weight, bias;
    if (EARLY_NORM) load_norm(norm, weight, bias);
    Main product(linear.part, first, tiles);
    product.prime();
    float* partial = (float*)shared;
    float2* scratch = (float2*)(partial + slots * WARPS * ROWS);
    u16* high = (u16*)(scratch + 2 * WARPS);
    wait_for_previous_kernel();
    read_residual<BF16, true>(from, norm, weight, bias, 1.f, high, scratch);
    __syncthreads();
    product.run({high, high + HIDDEN, 0}, partial);
    __syncthreads();
    int row = first * ROWS + threadIdx.x;
// 16의 배수까지 채운 행의 로짓은 적지 않는다
    if (threadIdx.x >= tiles * ROWS || row >= VOCAB) return;
    float value = Main::row(partial, threadIdx.x) * LOGIT_SCALE;
    logits[row] = LOGIT_CAP > 0.f ? LOGIT_CAP * tanhf(value * (1.f / (LOGIT_CAP > 0.f ? LOGIT_CAP : 1.f))) : value;
}
