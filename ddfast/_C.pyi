from collections.abc import Sequence

cuda_built: bool

def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
def set_cpu_level(name: str) -> None: ...
def set_poison(on: bool) -> None: ...
def normal_noise_cpu(seed: int, pairs: int, num_pairs: int, start: int, stop: int, channels: int, out: int) -> None: ...
def flow_cpu(
    cond: int,
    uncond: int,
    dtype: int,
    noise: int,
    codebook: int,
    rows: int,
    vocab: int,
    channels: int,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    rule: int,
    knots: Sequence[float],
    predict: Sequence[Sequence[float]],
    correct: Sequence[Sequence[float]],
    offset: float,
    shrink: float,
    certain: float,
    pair: float,
    prune: float,
    tokens: int,
    x: int,
    evaluations: int,
) -> None: ...
def filter_cpu(
    logits: int, rows: int, vocab: int, temperature: float, top_k: int, top_p: float, rule: int, out: int
) -> None: ...
def nearest_cpu(x: int, rows: int, codebook: int, vocab: int, channels: int, out: int) -> None: ...
def add_layer_norm_cpu(
    x: int,
    branch: int,
    gate: int,
    gate_stride: int,
    scale: int,
    scale_stride: int,
    shift: int,
    shift_stride: int,
    eps: float,
    rows: int,
    n: int,
    dim: int,
    out: int,
    half: bool,
) -> None: ...
def add_rms_norm_cpu(
    x: int,
    branch: int,
    weight: int,
    eps: float,
    rows: int,
    dim: int,
    out: int,
    half: bool,
) -> None: ...
def append_normed_cpu(
    qkv: int,
    scale: int,
    rows: int,
    n: int,
    heads: int,
    width: int,
    cache: int,
    side_stride: int,
    row_stride: int,
    head_stride: int,
    position_stride: int,
    length: int,
    half: bool,
) -> None: ...
def append_rotated_cpu(
    qkv: int,
    rope: int,
    rows: int,
    n: int,
    heads: int,
    kv_heads: int,
    width: int,
    cache: int,
    side_stride: int,
    row_stride: int,
    head_stride: int,
    position_stride: int,
    length: int,
    half: bool,
) -> None: ...
def attention_cpu(
    q: int,
    q_row: int,
    q_position: int,
    q_head: int,
    k: int,
    k_row: int,
    k_head: int,
    k_position: int,
    v: int,
    v_row: int,
    v_head: int,
    v_position: int,
    rows: int,
    n: int,
    heads: int,
    kv_heads: int,
    keys: int,
    width: int,
    scale: float,
    out: int,
    half: bool,
) -> None: ...
def swiglu_cpu(
    gate_up: int,
    rows: int,
    hidden: int,
    out: int,
    half: bool,
) -> None: ...
def quantizer_step_cpu(
    tokens: int,
    codebook: int,
    up: int,
    taps: int,
    num_taps: int,
    bias: int,
    ratio: float,
    batch: int,
    n: int,
    size: int,
    channels: int,
    f_hat: int,
    down: int,
    m: int,
    out: int,
) -> None: ...
def quantize_rows_cpu(x: int, rows: int, width: int, codes: int, scale: int, half: bool) -> None: ...
def scale_rows_cpu(
    product: int, scale: int, bias: int, gelu: bool, rows: int, width: int, out: int, half: bool
) -> None: ...
def parts_of(positions: int) -> int: ...
def gelu_cpu(x: int, dy: int, count: int, out: int, half: bool) -> None: ...
def glu_cpu(gate: int, up: int, dout: int, count: int, out: int, dgate: int, dup: int, half: bool) -> None: ...
def turn_heads_cpu(
    qkv: int,
    rope: int,
    rows: int,
    n: int,
    heads: int,
    kv_heads: int,
    width: int,
    q: int,
    k: int,
    v: int,
    back: bool,
    half: bool,
) -> None: ...
def norm_gradient_cpu(
    x: int,
    dy: int,
    scale: int,
    weight: int,
    scale_stride: int,
    eps: float,
    rows: int,
    n: int,
    dim: int,
    dx: int,
    sums: int,
    half: bool,
) -> None: ...
def gate_cpu(
    x: int,
    branch: int,
    gate: int,
    gate_stride: int,
    rows: int,
    n: int,
    dim: int,
    out: int,
    dbranch: int,
    sums: int,
    half: bool,
) -> None: ...
def split_heads_cpu(
    qkv: int,
    scale: int,
    rows: int,
    n: int,
    heads: int,
    width: int,
    q: int,
    k: int,
    v: int,
    dqkv: int,
    sums: int,
    half: bool,
) -> None: ...
def softmax_rows_cpu(
    scores: int,
    batch: int,
    n: int,
    keys: int,
    stride: int,
    own_score: int,
    own: int,
    lse: int,
    dp: int,
    carried: int,
    factor: float,
    p: int,
    ds: int,
    half: bool,
) -> None: ...

# Bodies of the CUDA kernels on the host: the numbers of a job, in the order of csrc/bindings_cuda.cpp.
def add_layer_norm_host(*job: float) -> None: ...
def add_rms_norm_host(*job: float) -> None: ...
def append_normed_host(*job: float) -> None: ...
def append_rotated_host(*job: float) -> None: ...
def decode_attention_host(*job: float) -> None: ...
def swiglu_host(*job: float) -> None: ...
def quantizer_step_host(*job: float) -> None: ...
def quantize_rows_host(*job: float) -> None: ...

# Only when cuda_built:
def normal_noise_cuda(
    seed: int, pairs: int, num_pairs: int, start: int, stop: int, channels: int, out: int, stream: int
) -> None: ...
def add_layer_norm_cuda(*job_and_stream: float) -> None: ...
def add_rms_norm_cuda(*job_and_stream: float) -> None: ...
def append_normed_cuda(*job_and_stream: float) -> None: ...
def append_rotated_cuda(*job_and_stream: float) -> None: ...
def decode_attention_cuda(*job_and_stream: float) -> None: ...
def swiglu_cuda(*job_and_stream: float) -> None: ...
def quantizer_step_cuda(*job_and_stream: float) -> None: ...
def quantize_rows_cuda(*job_and_stream: float) -> None: ...
