// The GPU's mapping: a thread owns VECTOR neighbouring neurons for all T steps.

// VECTOR neighbours in memory, which are moved together. The widest access has 16 bytes.
template <class E> struct alignas(sizeof(E) * VECTOR < 16 ? sizeof(E) * VECTOR : 16) Pack { E lane[VECTOR]; };

// The compiler neither narrows nor moves these accesses. It would delay another load until its first use, so that a
// thread waits for one step after the other, and it would store the neighbours of a step one by one.
#ifdef __CUDACC__
template <int BYTES> INLINE void load_bytes(const void *from, void *to) {
    static_assert(BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "of a register, or of a vector of them");
    bits32 *word = static_cast<bits32 *>(to);
    if constexpr (BYTES == 16)
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(from));
    else if constexpr (BYTES == 8)
        asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from));
    else if constexpr (BYTES == 4)
        asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(word[0]) : "l"(from));
    else
        asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(*static_cast<unsigned short *>(to)) : "l"(from));
}
template <int BYTES> INLINE void store_bytes(const void *from, void *to) {
    const bits32 *word = static_cast<const bits32 *>(from);
    if constexpr (BYTES == 16)
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]));
    else if constexpr (BYTES == 8)
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(to), "r"(word[0]), "r"(word[1]));
    else if constexpr (BYTES == 4)
        asm volatile("st.global.u32 [%0], %1;" :: "l"(to), "r"(word[0]));
    else
        asm volatile("st.global.u16 [%0], %1;" :: "l"(to), "h"(*static_cast<const unsigned short *>(from)));
}
#endif

template <class E> INLINE Pack<E> load_pack(const E *from) {
    constexpr int BYTES = sizeof(Pack<E>), WIDTH = BYTES < 16 ? BYTES : 16;
    Pack<E> pack;
    unroll<BYTES / WIDTH>([&](auto i) LAMBDA {
        constexpr int offset = i.value * (WIDTH / sizeof(E));
        load_bytes<WIDTH>(from + offset, &pack.lane[offset]);
    });
    return pack;
}
template <class E> INLINE void store_pack(const Pack<E> &pack, E *to) {
    constexpr int BYTES = sizeof(Pack<E>), WIDTH = BYTES < 16 ? BYTES : 16;
    unroll<BYTES / WIDTH>([&](auto i) LAMBDA {
        constexpr int offset = i.value * (WIDTH / sizeof(E));
        store_bytes<WIDTH>(&pack.lane[offset], to + offset);
    });
}

template <class E> INLINE bits32 first_bits(const Pack<E> &pack) {
    if constexpr (sizeof(pack) >= 4) return *reinterpret_cast<const bits32 *>(&pack);
    else return *reinterpret_cast<const unsigned short *>(&pack);
}

typedef State States[VECTOR];

// Loads the states of a thread's neurons at the start of a segment from the checkpoints or, for the first segment, from
// the initial states.
INLINE void load_states(const Call &call, const View &view, int segment, int64 neuron, States &states) {
    unroll<STATES>([&](auto j) LAMBDA {
        const real *from = segment ? call.checkpoints + ((segment - 1) * STATES + j) * view.neurons : call.initial[j];
        Pack<real> pack;
        if (from) pack = load_pack(from + neuron);
        unroll<VECTOR>([&](auto lane) LAMBDA {
            states[lane][j] = from ? pack.lane[lane] : real(call.initial_value[j]);
        });
    });
}

// Makes a state seem to depend on `something`, so that a step that starts from this state waits for it.
INLINE void start_after(const Call &call, bits32 something, real &state) {
#ifdef __CUDACC__
    if constexpr (sizeof(real) == 4)
        state = as_float(as_bits(state) | something & bits32(call.channel_repeat >> 32));  // 0, but no compiler knows
#endif
}

// Makes the first step wait for all packs, so that the assembler asks for them all before it. Otherwise the assembler
// would ask for the pack of one step after the other, and a thread would wait each time.
template <int L> INLINE void start_after_loads(const Call &call, const Pack<io> (&packs)[L], States &states) {
    bits32 any = 0;
    unroll<L>([&](auto s) LAMBDA { any |= first_bits(packs[s]); });
    unroll<VECTOR>([&](auto lane) LAMBDA { start_after(call, any, states[lane][0]); });
}

INLINE void store_state(const States &states, int j, real *to) {
    Pack<real> pack;
    unroll<VECTOR>([&](auto lane) LAMBDA { pack.lane[lane] = states[lane][j]; });
    store_pack(pack, to);
}

constexpr int BLOCK_SHIFT = 7;
static_assert(BLOCK == 1 << BLOCK_SHIFT, "a block's threads");

// A thread's place in a turn: its first neuron, and whether it has one at all.
struct Place { int64 neuron; bool inside; };

// How a block lies over the neurons. With CHANNELS_INNERMOST it is 1 << shift threads wide, as many as its channels
// need, and it takes as many outer positions at a time as its threads allow. Otherwise all its threads have the same
// channel.
struct Lie {
    int shift;            // log2 of the threads that lie side by side
    bits32 share, beside; // the block's number among those that share a channel, and among those beside each other
    int64 first;          // with CHANNELS_INNERMOST: a thread's first neuron, and its block's rows from there on
    int rows;
};

INLINE Lie lie_of(const Call &call) {
    bits32 across = bits32(call.channels);
    if (!CHANNELS_INNERMOST) return {0, blockIdx.x / across, blockIdx.x % across, 0, 0};
    const bits32 threads = (across + VECTOR - 1) / VECTOR;
    const int shift = threads > 16 ? 5 : threads > 8 ? 4 : threads > 4 ? 3 : threads > 2 ? 2 : threads > 1;
    across = (threads + (1u << shift) - 1) >> shift;
    const bits32 share = blockIdx.x / across, beside = blockIdx.x % across;
    const int64 column = int64((beside << shift) + (threadIdx.x & (1 << shift) - 1)) * VECTOR, o = share * call.rows;
    const int64 left = column < call.channels ? call.outer - o : 0;
    const int row = threadIdx.x >> shift, rows = int(left < call.rows ? left : call.rows);
    return {shift, share, beside, (o + row) * call.channels + column, rows - row};
}

// With CHANNELS_INNERMOST a block walks down `rows` outer positions of its columns. Otherwise it takes `rows` tiles of
// one channel, whose neurons are counted through all outer positions.
INLINE Place place_of(const Call &call, const Lie &lie, int turn) {
    if (CHANNELS_INNERMOST) {
        const int row = turn << BLOCK_SHIFT - lie.shift;
        return {lie.first + int64(row) * bits32(call.channels), row < lie.rows};
    }
    const int64 channel = lie.beside, size = call.outer * call.inner;
    const int64 n = ((int64(lie.share) * int(call.rows) + turn) * BLOCK + threadIdx.x) * VECTOR;
    int64 o = 0, position = n;
    if (call.outer > 1) {
        o = size < 0x7fffffff ? int64(bits32(n) / bits32(call.inner)) : n / call.inner;
        position = n - o * call.inner;
    }
    return {(o * call.channels + channel) * call.inner + position, n < size};
}

// The channels of a thread's lanes, which are the same in every turn. One division serves all lanes.
struct Channels { bits32 of_lane[CHANNELS_INNERMOST ? VECTOR : 1]; };

INLINE Channels channels_of(const Call &call, const Lie &lie) {
    Channels found = {{lie.beside}};
    if constexpr (CHANNELS_INNERMOST) {
        const bits32 repeat = bits32(call.channel_repeat);
        const bits32 column = ((lie.beside << lie.shift) + (threadIdx.x & (1 << lie.shift) - 1)) * VECTOR;
        bits32 channel = column / repeat, beside = column % repeat;
        unroll<VECTOR>([&](auto lane) LAMBDA {
            found.of_lane[lane] = channel;
            beside++;
            if (beside == repeat) { beside = 0; channel++; }
        });
    }
    return found;
}

// The parameters of a thread's channels. If a sequence has one segment, they stay in registers from turn to turn.
struct Held {
    const View &view;
    const Channels &channels;
    real value[CHANNELS_INNERMOST ? VECTOR : 1][AT_LEAST_ONE(PARAMETERS)][SEGMENTS == 1 ? T : 1];
};

INLINE Held hold(const View &view, const Channels &channels) {
    Held held = {view, channels};
    if constexpr (SEGMENTS == 1) unroll<CHANNELS_INNERMOST ? VECTOR : 1>([&](auto lane) LAMBDA {
        const bits32 channel = channels.of_lane[lane] < view.channels ? channels.of_lane[lane] : 0;
        unroll<T>([&](auto t) LAMBDA {
            Parameters p;
            load_parameters(view, channel, t, p);
            unroll<PARAMETERS>([&](auto j) LAMBDA { held.value[lane][j][t] = p[j]; });
        });
    });
    return held;
}

// Returns the function that gives walk and walk_back the parameters of a lane.
template <int LANE> INLINE auto parameters_of(const Held &held, int t0) {
    constexpr int lane = CHANNELS_INNERMOST ? LANE : 0;
    return [&held, t0](auto s, Parameters &p) LAMBDA {
        if constexpr (SEGMENTS == 1) unroll<PARAMETERS>([&](auto j) LAMBDA { p[j] = held.value[lane][j][s]; });
        else load_parameters(held.view, held.channels.of_lane[lane], t0 + s, p);
    };
}

INLINE int turns(const Call &call, const Lie &lie) {
    const int log2_tall = BLOCK_SHIFT - lie.shift;
    return CHANNELS_INNERMOST ? (int(call.rows) + (1 << log2_tall) - 1) >> log2_tall : int(call.rows);
}

extern "C" __global__ void __launch_bounds__(BLOCK) prepare(const Call call) {
    prepare_values(call, int64(blockIdx.x) * BLOCK + threadIdx.x, int64(call.rows) * BLOCK);
}

#if !BACKWARD
// How many blocks a multiprocessor has to run at a time, which sets the number of registers; 0 lets the assembler
// decide. With parameters of many steps and channels, it would spill a few registers to run more blocks.
constexpr int BLOCKS = CHANNELS_INNERMOST && SEGMENTS > 1 ? 2 : 0;

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) forward(const Call call) {
    const View view = view_of(call);
    const Lie lie = lie_of(call);
    const Channels channels = channels_of(call, lie);
    const Held held = hold(view, channels);
    for (int turn = 0; turn < turns(call, lie); turn++) {
        const Place place = place_of(call, lie, turn);
        if (!place.inside) continue;
        States states;
        load_states(call, view, 0, place.neuron, states);
        for_segments<false>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
            Pack<io> packs[L];
            unroll<L>([&](auto s) LAMBDA { packs[s] = load_pack(call.x + (t0 + s) * call.x_stride + place.neuron); });
            start_after_loads(call, packs, states);
            unroll<VECTOR>([&](auto lane) LAMBDA {
                real x[L];
                unroll<L>([&](auto s) LAMBDA { x[s] = load_(packs[s].lane[lane]); });
                walk<L>(view, place.neuron + lane, parameters_of<lane.value>(held, t0), t0, x, states[lane]);
                if constexpr (lane.value + 2 < VECTOR) start_after(call, as_bits(float(x[L - 1])), states[lane + 2][0]);
                unroll<L>([&](auto s) LAMBDA { store_(x[s], packs[s].lane[lane]); });
            });
            unroll<L>([&](auto s) LAMBDA {
                store_pack(packs[s], call.spikes + (t0 + s) * view.neurons + place.neuron);
            });
            if (t0 + L < T && call.checkpoints) unroll<STATES>([&](auto j) LAMBDA {
                store_state(states, j, call.checkpoints + (segment * STATES + j) * view.neurons + place.neuron);
            });
        });
        unroll<STATES>([&](auto j) LAMBDA {
            if (call.final[j]) store_state(states, j, call.final[j] + place.neuron);
        });
    }
}

#else
// Whether any gradient of a state is given or wanted.
INLINE bool has_state_gradients(const Call &call) {
    bool found = false;
    unroll<STATES>([&](auto j) LAMBDA { found |= call.grad_final[j] || call.grad_initial[j]; });
    return found;
}

constexpr int SUMS = CHANNELS_INNERMOST ? VECTOR : 1;  // lanes that share a channel share a sum
constexpr int AT_A_TIME = 32;                         // sums that shared memory has room for

// Sums N gradients of a lane over the threads that share a channel, in a fixed order. value(i) is a thread's own part
// of the i-th gradient, and gradient(i) is the gradient's number. AT_A_TIME gradients share a barrier. `add` says that
// the sums are added to what an earlier call wrote; `again` says that an earlier call may still read the shared memory.
template <int N, class Value, class Gradient>
INLINE void flush(const Call &call, const Lie &lie, int lane, const Value &value, const Gradient &gradient, bool add,
                  bool again) {
    constexpr int PARTS = CHANNELS_INNERMOST ? BLOCK : BLOCK / 32;
    __shared__ real shared[N < AT_A_TIME ? AT_LEAST_ONE(N) : AT_A_TIME][PARTS];
    unroll<(N + AT_A_TIME - 1) / AT_A_TIME>([&](auto part) LAMBDA {
        constexpr int FIRST = part.value * AT_A_TIME, HERE = N - FIRST < AT_A_TIME ? N - FIRST : AT_A_TIME;
        if (FIRST || again) __syncthreads();
        unroll<HERE>([&](auto i) LAMBDA {
            real sum = value(Constant<FIRST + i.value>());
            if (!CHANNELS_INNERMOST)
                for (int distance = 16; distance; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
            if (CHANNELS_INNERMOST) shared[i][threadIdx.x] = sum;
            else if (threadIdx.x % 32 == 0) shared[i][threadIdx.x / 32] = sum;
        });
        __syncthreads();
        for (int i = threadIdx.x; i < HERE << lie.shift; i += BLOCK) {
            const int across = i & (1 << lie.shift) - 1, g = gradient(FIRST + (i >> lie.shift));
            const int64 column = int64((lie.beside << lie.shift) + across) * VECTOR + lane;
            if (CHANNELS_INNERMOST && column >= call.channels) continue;
            real sum = 0;
            for (int part = across; part < PARTS; part += 1 << lie.shift) sum += shared[i >> lie.shift][part];
            real *to = call.partial + (CHANNELS_INNERMOST ? (int64(lie.share) * GRADS + g) * call.channels + column
                                               : int64(blockIdx.x) * GRADS + g);
            *to = add ? *to + sum : sum;
        }
    });
}

// How many blocks a multiprocessor has to run at a time, which sets the number of registers; 0 lets the assembler
// decide. For short sequences with channels innermost, it would take fewer registers and would compute again in every
// turn what depends on the parameters alone.
constexpr int BLOCKS = CHANNELS_INNERMOST && sizeof(real) == 4 && T * VECTOR < 16 ? 3 : 0;

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) backward(const Call call) {
    const View view = view_of(call);
    const Lie lie = lie_of(call);
    const Channels channels = channels_of(call, lie);
    const Held held = hold(view, channels);
    Summed summed[SUMS] = {};
    ByStep<SEGMENT> by_step[SUMS] = {};
    const bool with_states = has_state_gradients(call);
    for (int turn = 0; turn < turns(call, lie); turn++) {
        const Place place = place_of(call, lie, turn);
        States grad_states = {};
        if (with_states && place.inside) unroll<STATES>([&](auto j) LAMBDA {
            Pack<real> pack = {};
            if (call.grad_final[j]) pack = load_pack(call.grad_final[j] + place.neuron);
            unroll<VECTOR>([&](auto lane) LAMBDA { grad_states[lane][j] = pack.lane[lane]; });
        });
        for_segments<true>([&](auto length, int t0, int segment) LAMBDA {
            constexpr int L = length.value;
            if (place.inside) {
                Pack<io> packs[L], grads[L];
                unroll<L>([&](auto s) LAMBDA {
                    packs[s] = load_pack(call.x + (t0 + s) * call.x_stride + place.neuron);
                    grads[s] = load_pack(call.grad_spikes + (t0 + s) * call.grad_spikes_stride + place.neuron);
                });
                States states;
                load_states(call, view, segment, place.neuron, states);
                start_after_loads(call, packs, states);
                start_after_loads(call, grads, states);
                unroll<VECTOR>([&](auto lane) LAMBDA {
                    constexpr int sum = CHANNELS_INNERMOST ? lane.value : 0;
                    real x[L], grad[L];
                    ByStep<L> steps = {};
                    unroll<L>([&](auto s) LAMBDA {
                        x[s] = load_(packs[s].lane[lane]);
                        grad[s] = load_(grads[s].lane[lane]);
                    });
                    walk_back<L>(view, place.neuron + lane, parameters_of<lane.value>(held, t0), t0, x, states[lane],
                                 grad, grad_states[lane], summed[sum], steps);
                    unroll<L>([&](auto s) LAMBDA { store_(grad[s], grads[s].lane[lane]); });
                    unroll<BY_STEP>([&](auto q) LAMBDA {
                        unroll<L>([&](auto s) LAMBDA { by_step[sum][q][s] += steps[q][s]; });
                    });
                    // Two neighbours run at a time, because their steps fill each other's waits. More take registers.
                    if constexpr (lane.value + 2 < VECTOR)
                        start_after(call, as_bits(float(grad_states[lane][0])), states[lane + 2][0]);
                });
                if (call.grad_x) unroll<L>([&](auto s) LAMBDA {
                    store_pack(grads[s], call.grad_x + (t0 + s) * view.neurons + place.neuron);
                });
            }
            if constexpr (SEGMENTS > 1 && BY_STEP > 0)  // no thread could hold a sum for every step of a long sequence
                unroll<SUMS>([&](auto lane) LAMBDA {
                    flush<BY_STEP * L>(
                        call, lie, lane, [&](auto i) LAMBDA { return by_step[lane][i / L][i % L]; },
                        [&](int i) LAMBDA { return SUMMED + i / L * T + t0 + i % L; }, turn > 0, true);
                    unroll<BY_STEP>([&](auto q) LAMBDA {
                        unroll<L>([&](auto s) LAMBDA { by_step[lane][q][s] = 0; });
                    });
                });
        });
        if (with_states && place.inside) unroll<STATES>([&](auto j) LAMBDA {
            if (call.grad_initial[j]) store_state(grad_states, j, call.grad_initial[j] + place.neuron);
        });
    }
    constexpr int LEFT = SEGMENTS == 1 ? GRADS : SUMMED;
    if constexpr (LEFT > 0) unroll<SUMS>([&](auto lane) LAMBDA {
        flush<LEFT>(
            call, lie, lane,
            [&](auto i) LAMBDA {
                if constexpr (i.value < SUMMED) return summed[lane][i];
                else return by_step[lane][(i - SUMMED) / T][(i - SUMMED) % T];
            },
            [&](int i) LAMBDA { return i; }, false, lane.value > 0 || SEGMENTS > 1);
    });
}

// The second pass. `rows` blocks that share a channel have each left a partial sum of one gradient, and a block adds
// these sums in a fixed order. With CHANNELS_INNERMOST it also adds those of neighbours that share a channel.
extern "C" __global__ void __launch_bounds__(BLOCK) finish(const Call call) {
    __shared__ double shared[BLOCK / 32];
    const int64 e = blockIdx.x, stride = GRADS * call.channels;
    double sum = 0;
    for (int64 n = 0; n < call.channel_repeat; n++) {
        const real *from = call.partial + e * call.channel_repeat + n;
#pragma unroll 8
        for (int row = threadIdx.x; row < int(call.rows); row += BLOCK) sum += from[row * stride];
    }
    for (int distance = 16; distance; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < BLOCK / 32; warp++) sum += shared[warp];
    constexpr int grads = AT_LEAST_ONE(GRADS);
    const int64 channels = call.channels / call.channel_repeat;
    const int64 g = CHANNELS_INNERMOST ? e / channels : e % grads;
    const int64 channel = CHANNELS_INNERMOST ? e % channels : e / grads;
    call.grad_parameters[g * channels + channel] = gradient_of(call, int(g), channel, real(sum));
}
#endif
