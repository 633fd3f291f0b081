// The arguments of a launch, and what a time step reads of them. The GPU and the host have this in common.

constexpr int SEGMENTS = (T + SEGMENT - 1) / SEGMENT;      // a long sequence runs segment by segment
constexpr int LEARNED = SUMMED + BY_STEP;                  // parameters that have a gradient: one sum, or one per step
constexpr int GRADS = SUMMED + BY_STEP * T;
DEVICE constexpr int AT_LEAST_ONE(int n) { return n > 0 ? n : 1; }

typedef real State[STATES];
typedef real Parameters[AT_LEAST_ONE(PARAMETERS)];

// struct Call holds the arguments of a launch. Every field, or element of an array, has 8 bytes. A null pointer means
// that a result is not wanted, or that an input has its default value.
CALL

// What every time step reads. It is a copy in registers, which no store to an output can change.
struct View {
    const real *parameters[AT_LEAST_ONE(PARAMETERS)];
    real *sequences[STATES];
    const real *grad_sequences[STATES];
    int64 channels, neurons;  // the number of the parameters' channels, and of all neurons
};

// How many values parameter j has.
INLINE int64 size_of(const Call &call, int j) {
    return (PER_STEP >> j & 1 ? T : 1) * (PER_CHANNEL >> j & 1 ? call.channels / call.channel_repeat : 1);
}

// Calls body(j, to) for every parameter j that is prepared; `to` is where its prepared values lie.
template <class Body> INLINE void for_prepared(const Call &call, Body &&body) {
    real *to = call.prepared;
    unroll<PARAMETERS>([&](auto j) LAMBDA {
        if constexpr (PREPARED >> j.value & 1) {
            body(j, to);
            to += size_of(call, j);
        }
    });
}

// Computes every stride-th prepared value of each parameter, starting with value number `first`.
INLINE void prepare_values(const Call &call, int64 first, int64 stride) {
    for_prepared(call, [&](auto j, real *to) LAMBDA {
        for (int64 i = first; i < size_of(call, j); i += stride) to[i] = prepared(j, call.parameters[j][i]);
    });
}

// The gradient of the neuron's own parameter. `sum` is gradient g of the step's parameter, summed for one channel.
INLINE real gradient_of(const Call &call, int g, int64 channel, real sum) {
    const int of = g < SUMMED ? g : SUMMED + (g - SUMMED) / T, t = g < SUMMED ? 0 : (g - SUMMED) % T;
    real result = sum;
    unroll<LEARNED>([&](auto j) LAMBDA {
        if constexpr (PREPARED >> j.value & 1) if (of == j) {
            constexpr bool per_step = PER_STEP >> j.value & 1, per_channel = PER_CHANNEL >> j.value & 1;
            const int64 step = per_step ? t * (per_channel ? call.channels / call.channel_repeat : 1) : 0;
            result = prepared_back(j, call.parameters[j][step + (per_channel ? channel : 0)], sum);
        }
    });
    return result;
}

INLINE View view_of(const Call &call) {
    View view;
    unroll<PARAMETERS>([&](auto j) LAMBDA { view.parameters[j] = call.parameters[j]; });
    for_prepared(call, [&](auto j, real *to) LAMBDA { view.parameters[j] = to; });
    unroll<STATES>([&](auto j) LAMBDA {
        view.sequences[j] = call.sequences[j];
        view.grad_sequences[j] = call.grad_sequences[j];
    });
    view.channels = call.channels / call.channel_repeat;
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
