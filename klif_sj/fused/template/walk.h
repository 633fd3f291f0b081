// One neuron over L time steps, from registers to registers: what the GPU and the host have in common.

constexpr int SEGMENTS = (T + SEGMENT - 1) / SEGMENT;      // a long sequence is walked in segments
constexpr int LEARNED = TOTALS + STEPWISE;                 // parameters that have a gradient: one sum, or one per step
constexpr int GRADS = TOTALS + STEPWISE * T;
constexpr int AT_LEAST_ONE(int n) { return n > 0 ? n : 1; }

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
    const real *grad_sequences[STATES];                    // [T, neurons], or null: zero
    io *grad_x;                                            // [T, neurons]
    real *grad_initial[STATES];                            // [neurons]
    real *partial;                                         // sums of parameter gradients, before the second pass
    real *grad_parameters;                                 // [GRADS, channels]
    int64 outer, channels, inner, rows;                    // neuron = (outer * channels + channel) * inner + position
    int64 threads;
};

INLINE void load_parameters(const Call &call, int64 channel, int t, Parameters &p) {
    unroll<PARAMETERS>([&](auto j) LAMBDA {
        constexpr bool per_step = PER_STEP >> j.value & 1, per_channel = PER_CHANNEL >> j.value & 1;
        const int64 step = per_step ? t * (per_channel ? call.channels : 1) : 0;
        p[j] = call.parameters[j][step + (per_channel ? channel : 0)];
    });
}

INLINE void load_initial(const Call &call, int64 neuron, State &state) {
    unroll<STATES>([&](auto j) LAMBDA {
        state[j] = call.initial[j] ? call.initial[j][neuron] : real(call.initial_value[j]);
    });
}

INLINE void load_checkpoint(const Call &call, int64 neurons, int segment, int64 neuron, State &state) {
    if (segment == 0) load_initial(call, neuron, state);
    else unroll<STATES>([&](auto j) LAMBDA {
        state[j] = call.checkpoints[((segment - 1) * STATES + j) * neurons + neuron];
    });
}

INLINE void store_checkpoint(const Call &call, int64 neurons, int segment, int64 neuron, const State &state) {
    unroll<STATES>([&](auto j) LAMBDA {
        call.checkpoints[((segment - 1) * STATES + j) * neurons + neuron] = state[j];
    });
}

// Replaces the L inputs by the spikes and advances the state.
template <int L>
INLINE void walk(const Call &call, int64 neurons, int64 neuron, int64 channel, int t0, real (&x)[L], State &state) {
    unroll<L>([&](auto s) LAMBDA {
        Parameters p;
        load_parameters(call, channel, t0 + s, p);
        step(x[s], state, p, x[s]);
        if constexpr (RECORD) unroll<STATES>([&](auto j) LAMBDA {
            call.sequences[j][(t0 + s) * neurons + neuron] = state[j];
        });
    });
}

#if BACKWARD
// Recomputes the states from the one at t0, then walks back. Replaces the L gradients of the spikes by those of x, the
// gradient of the last state by that of the first, and adds to the gradients of the parameters.
template <int L>
INLINE void walk_back(const Call &call, int64 neurons, int64 neuron, int64 channel, int t0, const real (&x)[L],
                      const State &first, real (&grad)[L], State &grad_state, Totals &totals, Stepwise<L> &stepwise) {
    real history[L][STATES];
    State state;
    unroll<STATES>([&](auto j) LAMBDA { state[j] = first[j]; });
    unroll<L>([&](auto s) LAMBDA {
        unroll<STATES>([&](auto j) LAMBDA { history[s][j] = state[j]; });
        if constexpr (s.value + 1 < L) {
            Parameters p;
            real spike;
            load_parameters(call, channel, t0 + s, p);
            step(x[s], state, p, spike);
        }
    });
    unroll<L>([&](auto reversed) LAMBDA {
        constexpr int s = L - 1 - reversed.value;
        if constexpr (RECORD) unroll<STATES>([&](auto j) LAMBDA {
            if (call.grad_sequences[j]) grad_state[j] += call.grad_sequences[j][(t0 + s) * neurons + neuron];
        });
        Parameters p;
        real grad_p[AT_LEAST_ONE(LEARNED)];
        load_parameters(call, channel, t0 + s, p);
        step_backward(x[s], history[s], p, grad[s], grad_state, grad_p, grad[s]);
        unroll<TOTALS>([&](auto q) LAMBDA { totals[q] += grad_p[q]; });
        unroll<STEPWISE>([&](auto q) LAMBDA { stepwise[q][s] += grad_p[TOTALS + q]; });
    });
}
#endif
