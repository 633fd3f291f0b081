// The host's loops. OpenMP distributes blocks of LANES neurons over threads. A block runs one time step after the
// other, vectorised over its neurons. Its rows and states stay in the first-level cache, and the vectors of a step do
// not wait for each other, as the steps of one neuron would.

typedef real Lanes[LANES];
constexpr bool CONVERTS = sizeof(io) != sizeof(real);

static int64 blocks_of(int64 n, int64 size) { return (n + size - 1) / size; }

// stream_store stores around the caches; other threads see the values after finish_streaming. It is written with the
// compiler's builtins, because a header with such functions takes longer to compile than the rest of a kernel.
typedef float Narrow __attribute__((vector_size(16)));
#ifdef __AVX512F__
typedef float Widest __attribute__((vector_size(64)));
#else
typedef Narrow Widest;
#endif
#ifdef __clang__
template <class Wide> INLINE void stream_store(Wide *to, Wide value) { __builtin_nontemporal_store(value, to); }
#elif defined(__SSE2__)
INLINE void stream_store(Narrow *to, Narrow value) { __builtin_ia32_movntps(reinterpret_cast<float *>(to), value); }
#ifdef __AVX512F__
INLINE void stream_store(Widest *to, Widest value) { __builtin_ia32_movntps512(reinterpret_cast<float *>(to), value); }
#endif
#else
INLINE void stream_store(Narrow *to, Narrow value) { *to = value; }
#endif
INLINE void finish_streaming() {
#ifdef __SSE2__
    __builtin_ia32_sfence();
#endif
}

struct Block {
    int64 first, channel;  // the neuron and the channel of the first lane
    int lanes;
    int64 slot, grad_stride;  // its sums of gradient g are added to partial[slot + g * grad_stride]
    bool fresh;  // whether it is the first block to add its sums there
};

// Blocks form runs. runs_beside counts runs with different channels; blocks_in_line and runs_in_line count the blocks
// and the runs that have the same channels.
static int64 runs_beside(const Call &call) {
    return CHANNELS_INNERMOST ? blocks_of(call.channels, LANES) : call.channels;
}
static int64 blocks_in_line(const Call &call) {
    return call.outer * (CHANNELS_INNERMOST ? 1 : blocks_of(call.inner, LANES));
}
static int64 runs_in_line(const Call &call) { return blocks_of(blocks_in_line(call), call.rows); }

// Calls body for every block. A run of `rows` blocks has the same channels and shares a row of partial sums. With
// CHANNELS_INNERMOST every neuron of a block has its own channel (inner is 1); otherwise a block lies within one
// channel.
template <class Body> static void for_blocks(const Call &call, const Body &body) {
    const int64 beside = runs_beside(call), runs = beside * runs_in_line(call), wide = blocks_of(call.inner, LANES);
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
#pragma omp for schedule(static)
        for (int64 run = 0; run < runs; run++) {
            const int64 begin = run / beside * call.rows, end = begin + call.rows, blocks = blocks_in_line(call);
            for (int64 b = begin; b < end && b < blocks; b++) {
                const int64 position = (CHANNELS_INNERMOST ? run % beside : b % wide) * LANES;
                const int64 left = (CHANNELS_INNERMOST ? call.channels : call.inner) - position;
                const int lanes = left < LANES ? left : LANES;
                if (CHANNELS_INNERMOST)
                    body(Block{b * call.channels + position, position, lanes,
                               run / beside * GRADS * call.channels + position, call.channels, b == begin});
                else {
                    const int64 channel = run % beside, line = b / wide * call.channels + channel;
                    body(Block{line * call.inner + position, channel, lanes, run * GRADS * FOLD, FOLD, b == begin});
                }
            }
        }
        finish_streaming();
    }
}

// Fills the states at the start of a segment from the checkpoints or, for the first segment, from the initial states.
static void fill_states(const Call &call, int64 neurons, int segment, const Block &block, Lanes (&states)[STATES]) {
    for (int j = 0; j < STATES; j++) {
        const real *from = segment ? call.checkpoints + ((segment - 1) * STATES + j) * neurons : call.initial[j];
        if (from) memcpy(states[j], from + block.first, block.lanes * sizeof(real));
        else for (int lane = 0; lane < block.lanes; lane++) states[j][lane] = real(call.initial_value[j]);
    }
}

// A row is one time step of a block in the arithmetic's type. It stays where it is, or is converted into a buffer.
INLINE const real *load_row(const io *from, int lanes, Lanes &buffer) {
    if (!CONVERTS) return reinterpret_cast<const real *>(from);
#pragma omp simd
    for (int64 lane = 0; lane < lanes; lane++) buffer[lane] = load_(from[lane]);
    return buffer;
}

// Prefetches a row that is needed soon. The rows of a block are short and far apart, so the processor sees no pattern.
INLINE void fetch_row(const io *from) {
    for (int64 byte = 0; byte < LANES * int64(sizeof(io)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char *>(from) + byte, 0, 2);
}

// A large output would leave the caches before anybody reads it. A store around the caches does not read the old
// values first.
static bool is_large(const void *start, int64 bytes) { return start && bytes >= LARGE; }

// Stores a row around the caches, if it is aligned to stores of this width.
template <class Wide> INLINE bool stream_as(void *to, const void *from, int64 bytes) {
    if ((int64(to) | bytes) % sizeof(Wide)) return false;
    for (int64 i = 0; i < bytes; i += sizeof(Wide)) {
        Wide value;
        memcpy(&value, static_cast<const char *>(from) + i, sizeof(Wide));
        stream_store(reinterpret_cast<Wide *>(static_cast<char *>(to) + i), value);
    }
    return true;
}

static void copy_row(void *to, const void *from, int64 bytes, bool stream) {
    if (stream && (stream_as<Widest>(to, from, bytes) || stream_as<Narrow>(to, from, bytes))) return;
    memcpy(to, from, bytes);
}

// Where a row of results is computed: in the output itself, or in a buffer that store_row converts or streams.
INLINE real *row_for(io *to, Lanes &buffer, bool stream) {
    return CONVERTS || stream || !to ? buffer : reinterpret_cast<real *>(to);
}

INLINE void store_row(const Lanes &row, io *to, int lanes, bool stream) {
    if (!to || !(CONVERTS || stream)) return;
    if (!CONVERTS) return copy_row(to, row, lanes * sizeof(io), stream);
    io converted[LANES];
#pragma omp simd
    for (int64 lane = 0; lane < lanes; lane++) store_(row[lane], converted[lane]);
    copy_row(to, converted, lanes * sizeof(io), stream);
}

// Memory for a launch. It is no tensor, because torch can take longer to make a tensor than a small layer runs.
struct Scratch {
    real *const start;
    const bool missing;
    explicit Scratch(int64 size)
        : start(size ? static_cast<real *>(aligned_alloc(64, blocks_of(size * sizeof(real), 64) * 64)) : nullptr),
          missing(size && !start) {}
    ~Scratch() { free(start); }
};
constexpr int NO_MEMORY = 1;

// columns_of returns what every step reads. If neighbours share a channel, it writes the channel's parameters to `to`
// once for each of them, so that the lanes of a vector read them side by side.
static int64 spread_size(const Call &call) { return call.channel_repeat > 1 ? VALUES_OF_CHANNEL * call.channels : 0; }
static int64 prepared_size(const Call &call) {
    int64 size = 0;
    for_prepared(call, [&](auto j, real *) LAMBDA { size += size_of(call, j); });
    return size;
}
static View columns_of(const Call &call, real *to) {
    View view = view_of(call);
    if (call.channel_repeat == 1) return view;
    unroll<PARAMETERS>([&](auto j) LAMBDA {
        if (!(PER_CHANNEL >> j.value & 1)) return;
        const real *from = view.parameters[j];
        view.parameters[j] = to;
        for (int64 i = 0; i < (PER_STEP >> j.value & 1 ? T : 1) * view.channels; i++)
            for (int64 n = 0; n < call.channel_repeat; n++) *to++ = from[i];
    });
    view.channels = call.channels;
    return view;
}

// Sets p to the parameters of a lane, which are its own or those of the whole block.
INLINE void parameters_of(const View &view, const Block &block, int64 lane, int t, const Parameters &shared,
                          Parameters &p) {
    if (CHANNELS_INNERMOST) load_parameters(view, block.channel + lane, t, p);
    else unroll<PARAMETERS>([&](auto j) LAMBDA { p[j] = shared[j]; });
}

#if !BACKWARD
// A lane's local variables are in this function and not in the loop, where OpenMP would keep them in memory.
INLINE void step_lane(const View &view, const Block &block, int64 lane, int t, const Parameters &shared, const real *x,
                      real *spikes, Lanes (&states)[STATES]) {
    State state;
    Parameters p;
    real spike;
    parameters_of(view, block, lane, t, shared, p);
    unroll<STATES>([&](auto j) LAMBDA { state[j] = states[j][lane]; });
    step(x[lane], state, p, spike);
    unroll<STATES>([&](auto j) LAMBDA { states[j][lane] = state[j]; });
    spikes[lane] = spike;
}

extern "C" int forward(const Call *launch) {
    Call call = *launch;
    const Scratch spread(spread_size(call)), prepared(prepared_size(call));
    if (spread.missing || prepared.missing) return NO_MEMORY;
    call.prepared = prepared.start;
    prepare_values(call, 0, 1);
    const View view = columns_of(call, spread.start);
    const bool stream = is_large(call.spikes, T * view.neurons * int64(sizeof(io)));
    for_blocks(call, [&](const Block &block) {
        const int lanes = block.lanes;
        Lanes states[STATES], inputs, outputs;
        fill_states(call, view.neurons, 0, block, states);
        for (int t = 0; t < T; t++) {
            io *to = call.spikes + t * view.neurons + block.first;
            const real *x = load_row(call.x + t * call.x_stride + block.first, lanes, inputs);
            real *spikes = row_for(to, outputs, stream);
            Parameters shared;
            if (!CHANNELS_INNERMOST) load_parameters(view, block.channel, t, shared);
#pragma omp simd
            for (int64 lane = 0; lane < lanes; lane++) step_lane(view, block, lane, t, shared, x, spikes, states);
            store_row(outputs, to, lanes, stream);
            for (int j = 0; j < STATES; j++) {
                if (RECORD) memcpy(view.sequences[j] + t * view.neurons + block.first, states[j], lanes * sizeof(real));
                if ((t + 1) % SEGMENT == 0 && t + 1 < T && call.checkpoints)
                    memcpy(call.checkpoints + (t / SEGMENT * STATES + j) * view.neurons + block.first, states[j],
                           lanes * sizeof(real));
            }
        }
        for (int j = 0; j < STATES; j++)
            if (call.final[j]) memcpy(call.final[j] + block.first, states[j], lanes * sizeof(real));
    });
    return 0;
}
#else
// Repeats the step, and notes the state after it and the costly results that are kept for step_back_lane.
INLINE void repeat_lane(const View &view, const Block &block, int64 lane, int t, const Parameters &shared,
                        const real *x, const Lanes (&before)[STATES], Lanes (&after)[STATES],
                        Lanes (&kept)[AT_LEAST_ONE(KEPT)]) {
    State state;
    Parameters p;
    real spike, keep[AT_LEAST_ONE(KEPT)];
    parameters_of(view, block, lane, t, shared, p);
    unroll<STATES>([&](auto j) LAMBDA { state[j] = before[j][lane]; });
    step(x[lane], state, p, spike, keep);
    unroll<STATES>([&](auto j) LAMBDA { after[j][lane] = state[j]; });
    unroll<KEPT>([&](auto j) LAMBDA { kept[j][lane] = keep[j]; });
}

INLINE void step_back_lane(const View &view, const Block &block, int64 lane, int t, const Parameters &shared,
                           const real *x, const Lanes (&before)[STATES], const Lanes (&kept)[AT_LEAST_ONE(KEPT)],
                           const real *grad_spikes, real *grad_x, Lanes (&grad_states)[STATES],
                           Lanes (&summed)[AT_LEAST_ONE(SUMMED)], Lanes (&by_step)[AT_LEAST_ONE(BY_STEP)]) {
    State state, grad_state;
    Parameters p;
    real keep[AT_LEAST_ONE(KEPT)], sum_p[AT_LEAST_ONE(LEARNED)], grad;
    parameters_of(view, block, lane, t, shared, p);
    unroll<KEPT>([&](auto j) LAMBDA { keep[j] = kept[j][lane]; });
    unroll<STATES>([&](auto j) LAMBDA {
        state[j] = before[j][lane];
        grad_state[j] = grad_states[j][lane];
        if (RECORD) grad_state[j] += view.grad_sequences[j][t * view.neurons + block.first + lane];
    });
    unroll<SUMMED>([&](auto q) LAMBDA { sum_p[q] = summed[q][lane]; });
    unroll<BY_STEP>([&](auto q) LAMBDA { sum_p[SUMMED + q] = 0; });
    step_backward(x[lane], state, p, keep, grad_spikes[lane], grad_state, sum_p, grad);
    grad_x[lane] = grad;
    unroll<STATES>([&](auto j) LAMBDA { grad_states[j][lane] = grad_state[j]; });
    unroll<SUMMED>([&](auto q) LAMBDA { summed[q][lane] = sum_p[q]; });
    unroll<BY_STEP>([&](auto q) LAMBDA { by_step[q][lane] = sum_p[SUMMED + q]; });
}

// Adds a block's sums of gradient g to the partial sums of its run: by channel with CHANNELS_INNERMOST, otherwise
// folded to FOLD lanes. Lanes that the block does not have are zero.
static void store_sum(const Call &call, const Block &block, int g, const Lanes &from) {
    real *to = call.partial + block.slot + g * block.grad_stride;
    const int lanes = CHANNELS_INNERMOST ? block.lanes : FOLD;
    real sum[CHANNELS_INNERMOST ? LANES : FOLD];
    memcpy(sum, from, sizeof(sum));
    if (!CHANNELS_INNERMOST) unroll<LANES / FOLD - 1>([&](auto i) LAMBDA {
#pragma omp simd
        for (int lane = 0; lane < FOLD; lane++) sum[lane] += from[(i + 1) * FOLD + lane];
    });
#pragma omp simd
    for (int lane = 0; lane < lanes; lane++) to[lane] = (block.fresh ? real(0) : to[lane]) + sum[lane];
}

// The second pass adds the rows of partial sums to one sum for each gradient and channel, in double, in a fixed order.
static void finish(const Call &call) {
    const int64 channels = call.channels / call.channel_repeat;
    for (int64 c = 0; c < channels; c++)
        for (int64 g = 0; g < GRADS; g++) {
            double sum = 0, lanes[FOLD] = {};
            for (int64 row = 0; row < runs_in_line(call); row++)
                if (CHANNELS_INNERMOST) {
                    const real *from = call.partial + ((row * GRADS + g) * channels + c) * call.channel_repeat;
                    for (int64 n = 0; n < call.channel_repeat; n++) sum += from[n];
                } else {
                    const real *from = call.partial + ((row * channels + c) * GRADS + g) * FOLD;
#pragma omp simd
                    for (int lane = 0; lane < FOLD; lane++) lanes[lane] += from[lane];
                }
            for (double lane : lanes) sum += lane;
            call.grad_parameters[g * channels + c] = gradient_of(call, int(g), c, real(sum));
        }
}

extern "C" int backward(const Call *launch) {
    Call call = *launch;
    const Scratch spread(spread_size(call)), prepared(prepared_size(call)), partial(call.partial ? 0 : call.sums);
    if (spread.missing || prepared.missing || partial.missing) return NO_MEMORY;
    if (!call.partial) call.partial = partial.start;
    call.prepared = prepared.start;
    prepare_values(call, 0, 1);
    const View view = columns_of(call, spread.start);
    const bool stream = is_large(call.grad_x, T * view.neurons * int64(sizeof(io)));
    for_blocks(call, [&](const Block &block) {
        const int lanes = block.lanes;
        Lanes grad_states[STATES], grads, outputs;
        Lanes summed[AT_LEAST_ONE(SUMMED)], by_step[AT_LEAST_ONE(BY_STEP)];
        Lanes before[SEGMENT + 1][STATES], kept[SEGMENT][AT_LEAST_ONE(KEPT)], inputs[CONVERTS ? SEGMENT : 1];
        const real *x[SEGMENT];
        memset(summed, 0, sizeof(summed));
        memset(by_step, 0, sizeof(by_step));
        for (int j = 0; j < STATES; j++) {
            if (call.grad_final[j]) memcpy(grad_states[j], call.grad_final[j] + block.first, lanes * sizeof(real));
            else memset(grad_states[j], 0, sizeof(grad_states[j]));
        }
        for (int segment = SEGMENTS - 1; segment >= 0; segment--) {
            const int t0 = segment * SEGMENT, length = T - t0 < SEGMENT ? T - t0 : SEGMENT;
            fill_states(call, view.neurons, segment, block, before[0]);
            for (int s = 0; s < length; s++) {
                const int t = t0 + s;
                fetch_row(call.grad_spikes + t * call.grad_spikes_stride + block.first);
                x[s] = load_row(call.x + t * call.x_stride + block.first, lanes, inputs[CONVERTS ? s : 0]);
                Parameters shared;
                if (!CHANNELS_INNERMOST) load_parameters(view, block.channel, t, shared);
#pragma omp simd
                for (int64 lane = 0; lane < lanes; lane++)
                    repeat_lane(view, block, lane, t, shared, x[s], before[s], before[s + 1], kept[s]);
            }
            for (int s = length - 1; s >= 0; s--) {
                const int t = t0 + s;
                fetch_row(call.x + t * call.x_stride + block.first + LANES);
                io *to = call.grad_x ? call.grad_x + t * view.neurons + block.first : nullptr;
                const io *arriving = call.grad_spikes + t * call.grad_spikes_stride + block.first;
                const real *grad_spikes = load_row(arriving, lanes, grads);
                real *grad_x = row_for(to, outputs, stream);
                Parameters shared;
                if (!CHANNELS_INNERMOST) load_parameters(view, block.channel, t, shared);
#pragma omp simd
                for (int64 lane = 0; lane < lanes; lane++)
                    step_back_lane(view, block, lane, t, shared, x[s], before[s], kept[s], grad_spikes, grad_x,
                                   grad_states, summed, by_step);
                store_row(outputs, to, lanes, stream);
                for (int q = 0; q < BY_STEP; q++) store_sum(call, block, SUMMED + q * T + t, by_step[q]);
            }
        }
        for (int j = 0; j < STATES; j++)
            if (call.grad_initial[j]) memcpy(call.grad_initial[j] + block.first, grad_states[j], lanes * sizeof(real));
        for (int q = 0; q < SUMMED; q++) store_sum(call, block, q, summed[q]);
    });
    finish(call);
    return 0;
}
#endif
