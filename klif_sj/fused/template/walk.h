// One neuron over L time steps, from registers to registers: what the GPU and the host have in common.

constexpr int SEGMENTS = (T + SEGMENT - 1) / SEGMENT;      // a long sequence is walked in segments
constexpr int LEARNED = TOTALS + STEPWISE;                 // parameters that have a gradient: one sum, or one per step
constexpr int GRADS = TOTALS + STEPWISE * T;
DEVICE constexpr int AT_LEAST_ONE(int n) { return n > 0 ? n : 1; }

typedef real State[STATES];
typedef real Parameters[AT_LEAST_ONE(PARAMETERS)];
typedef real Totals[AT_LEAST_ONE(TOTALS)];
template <int L> using Stepwise = real[AT_LEAST_ONE(STEPWISE)][L];

// What a launch is told. Every field has 8 bytes; a pointer that is null means: not wanted, or a default.
struct Call {
    const io *x;
    int64 x_stride;                                        // elements from one time step to the next
    io *spikes;                                            // [T, neurons]
    const real *initial[STATES];                           // [neurons], or null: initial_value
    double initial_value[STATES];
    real *final[STATES];                                   // [neurons]
    real *checkpoints;                                     // [SEGMENTS - 1, STATES, neurons]: states where segments start
    real *sequences[STATES];                               // [T, neurons], with RECORD
    const real *parameters[AT_LEAST_ONE(PARAMETERS)];      // each scalar, [channels], [T] or [T, channels]
    const io *grad_spikes;
    int64 grad_spikes_stride;
    const real *grad_final[STATES];                        // [neurons], or null: zero
    const real *grad_sequences[STATES];                    // [T, neurons], with RECORD
    io *grad_x;                                            // [T, neurons]
    real *grad_initial[STATES];                            // [neurons]
    real *partial;                                         // sums of parameter gradients, before the second pass
    real *grad_parameters;                                 // [GRADS, channels]
    int64 outer, channels, inner, rows;                    // neuron = (outer * channels + channel) * inner + position
    int64 threads;
};

// Calls body(Constant<length>, t0, segment) for every segment, in order or backwards.
template <bool REVERSED, class Body> INLINE void for_segments(Body &&body) {
    constexpr int TAIL = T % SEGMENT;
    if (REVERSED && TAIL) body(Constant<TAIL ? TAIL : 1>(), T - TAIL, SEGMENTS - 1);
    for (int n = 0; n < T / SEGMENT; n++) {
        const int segment = REVERSED ? T / SEGMENT - 1 - n : n;
        body(Constant<SEGMENT>(), segment * SEGMENT, segment);
    }
    if (!REVERSED && TAIL) body(Constant<TAIL ? TAIL : 1>(), T - TAIL, SEGMENTS - 1);
}

// What every step of a walk looks up; a copy in registers, which no store through the outputs can touch.
struct View {
    const real *parameters[AT_LEAST_ONE(PARAMETERS)];
    real *sequences[STATES];
    const real *grad_sequences[STATES];
    int64 channels, neurons;
};

INLINE View view_of(const Call &call) {
    View view;
    unroll<PARAMETERS>([&](auto j) LAMBDA { view.parameters[j] = call.parameters[j]; });
    unroll<STATES>([&](auto j) LAMBDA {
        view.sequences[j] = call.sequences[j];
        view.grad_sequences[j] = call.grad_sequences[j];
    });
    view.channels = call.channels;
    view.neurons = call.outer * call.channels * call.inner;
    return view;
}

INLINE void load_parameters(const View &view, int64 channel, int t, Parameters &p) {
    unroll<PARAMETERS>([&](auto j) LAMBDA {
        constexpr bool per_step = PER_STEP >> j.value & 1, per_channel = PER_CHANNEL >> j.value & 1;
        const int64 step = per_step ? t * (per_channel ? view.channels : 1) : 0;
        p[j] = view.parameters[j][step + (per_channel ? channel : 0)];
    });
}

// Replaces the L inputs by the spikes and advances the state.
template <int L>
INLINE void walk(const View &view, int64 neuron, int64 channel, int t0, real (&x)[L], State &state) {
    unroll<L>([&](auto s) LAMBDA {
        Parameters p;
        load_parameters(view, channel, t0 + s, p);
        step(x[s], state, p, x[s]);
        if constexpr (RECORD) unroll<STATES>([&](auto j) LAMBDA {
            view.sequences[j][(t0 + s) * view.neurons + neuron] = state[j];
        });
    });
}

#if BACKWARD
// Recomputes the states from the one at t0, then walks back. Replaces the L gradients of the spikes by those of x, the
// gradient of the last state by that of the first, and adds to the gradients of the parameters.
template <int L>
INLINE void walk_back(const View &view, int64 neuron, int64 channel, int t0, const real (&x)[L],
                      const State &first, real (&grad)[L], State &grad_state, Totals &totals, Stepwise<L> &stepwise) {
    real history[L][STATES];
    State state;
    unroll<STATES>([&](auto j) LAMBDA { state[j] = first[j]; });
    unroll<L>([&](auto s) LAMBDA {
        unroll<STATES>([&](auto j) LAMBDA { history[s][j] = state[j]; });
        if constexpr (s.value + 1 < L) {
            Parameters p;
            real spike;
            load_parameters(view, channel, t0 + s, p);
            step(x[s], state, p, spike);
        }
    });
    unroll<L>([&](auto reversed) LAMBDA {
        constexpr int s = L - 1 - reversed.value;
        if constexpr (RECORD) unroll<STATES>([&](auto j) LAMBDA {
            grad_state[j] += view.grad_sequences[j][(t0 + s) * view.neurons + neuron];
        });
        Parameters p;
        real grad_p[AT_LEAST_ONE(LEARNED)];
        load_parameters(view, channel, t0 + s, p);
        step_backward(x[s], history[s], p, grad[s], grad_state, grad_p, grad[s]);
        unroll<TOTALS>([&](auto q) LAMBDA { totals[q] += grad_p[q]; });
        unroll<STEPWISE>([&](auto q) LAMBDA { stepwise[q][s] += grad_p[TOTALS + q]; });
    });
}
#endif
