"""A plan step by step: each formula, its numbers, and the assumption it rests on."""

from hotset.cost.attention import KV_BYTES, Attention
from hotset.cost.cache_spec import Latent, NoCache, Shared, State
from hotset.cost.params import WEIGHT_BITS
from hotset.cost.step_time import CAUSES
from hotset.plan.choices import BLOCK_SIZE, SLICE_TOKENS, claimed_bytes
from hotset.plan.result import Plan
from hotset.plan.text import gb, seconds


def explain_plan(plan: Plan) -> str:
    """The text of `hotset plan --explain`."""
    sections = (_weights, _kv, _rank, _capacity, _step, _rate, _ttft, _sources)
    lines: list[str] = []
    for number, section in enumerate(sections, 1):
        title, body = section(plan)
        lines += [f"{number}. {title}", *("   " + line for line in body), ""]
    return "\n".join(lines).rstrip()


Section = tuple[str, list[str]]


def _weights(plan: Plan) -> Section:
    shape = plan.request.shape
    body = [
        f"parameters = {shape.total_params:,} ({shape.source})",
        f"weights = {gb(shape.weights_bytes)}: {shape.weights_bytes:,} B, matrices as "
        f"{shape.matrix_dtype} at {WEIGHT_BITS[shape.matrix_dtype] / 8:g} B each with scales",
    ]
    if shape.moe_layers:
        layer = shape.moe_layers[0]
        body += [
            f"one expert = {layer.expert.count:,} parameters = {shape.expert_bytes_each:,} B",
            f"experts = {len(shape.moe_layers)} layers x {shape.num_experts} x "
            f"{gb(shape.expert_bytes_each)} = {gb(shape.experts_bytes)}",
            f"active per token = dense {shape.dense_params:,} + {len(shape.moe_layers)} x "
            f"{shape.top_k_experts} experts = {shape.active_params:,}",
        ]
    body.append(
        "Assumes: embeddings, head, router and norms stay 16-bit; a vision tower is not loaded."
    )
    return "Weights", body


def _kv(plan: Plan) -> Section:
    request = plan.request
    shape, context, dtype = request.shape, request.workload.context, request.kv_dtype
    body = [_kv_line(attention, n, context, dtype) for attention, _, n in shape.readers]
    if shape.index_bytes_per_token:
        body.append(f"index keys: {shape.index_bytes_per_token:,} B per token over all layers")
    body += [
        f"a further token = {shape.kv_bytes_per_token(dtype):,} B over all layers that grow",
        f"one user of {context:,} tokens = {plan.kv_bytes_per_user:,} B = "
        f"{plan.kv_bytes_per_user / 1e9:.2f} GB = {plan.kv_bytes_per_user / 2**30:.1f} GiB",
        f"{request.workload.users:,} users = {request.workload.users:,} x "
        f"{gb(plan.kv_bytes_per_user)} = {gb(plan.kv_bytes_per_user * request.workload.users)}",
    ]
    windows = any(a.cache.window for a, _, _ in shape.readers)
    if windows and request.free_windows:
        body.append("Assumes: the engine frees what a window has left (--free-windows).")
    else:
        body.append("Assumes: every token of a user is kept, with no sharing between users.")
    return "KV", body


def _kv_line(attention: Attention, layers: int, context: int, dtype: str) -> str:
    size = KV_BYTES[dtype]
    each = attention.token_bytes(dtype)
    cache = attention.cache
    if isinstance(cache, Latent):
        return (
            f"{layers} MLA layers: latent and rotary part, {cache.rank + cache.rope_dim} wide, "
            f"once: {each:,.0f} B per token and layer"
        )
    if isinstance(cache, State):
        return f"{layers} recurrent layers: {cache.sequence_bytes:,} B each, whatever the context"
    if isinstance(cache, Shared):
        return f"{layers} layers share the KV of earlier ones: 0 B"
    if isinstance(cache, NoCache):
        return f"{layers} layers without attention: 0 B"
    text = (
        f"{layers} {attention.kind.value} layers: 2 x {cache.num_kv_heads} KV heads x "
        f"{cache.key_dim} x {size:g} B = {each:,.0f} B per token and layer"
    )
    if cache.window:
        text += f", at most {cache.window:,} of {context:,} tokens"
    return text


def _rank(plan: Plan) -> Section:
    layout, shard, shape = plan.layout, plan.cost.shard, plan.request.shape
    body = [
        f"{layout}: {layout.dp} group{'s' if layout.dp > 1 else ''} of {layout.tp} GPUs",
        f"dense weights per GPU = {gb(shard.dense_bytes)} of {gb(shape.dense_bytes)}: its part of "
        "matrices that are cut, and all that is not (norms, routers, down-projections of MLA)",
    ]
    if shape.moe_layers:
        how = f"ceil({shape.num_experts} / {layout.ep})" if layout.ep > 1 else "a slice of each of"
        body.append(
            f"experts per GPU = {how} {'= ' if layout.ep > 1 else ''}{shard.expert_slots} per "
            f"layer = {gb(shard.experts_bytes)}"
        )
    reason = (
        "each rank needs the whole MLA latent"
        if shape.is_mla
        else f"{layout.tp} ranks share {shape.min_kv_heads} KV heads"
    )
    body += [
        f"KV copies in a group = {plan.kv_copies:g}: {reason}",
        "Assumes: no decode context parallelism; data-parallel groups equally full.",
    ]
    return "One GPU's share", body


def _capacity(plan: Plan) -> Section:
    gpus = plan.layout.gpus
    each, claimed = plan.request.hardware.hbm_bytes, claimed_bytes(plan.request)
    body = [
        f"HBM per GPU = {gb(claimed)} of {gb(each)} - dense {gb(plan.cost.shard.dense_bytes)} - "
        f"workspace and staging {gb(plan.workspace_bytes / gpus)} - experts "
        f"{gb(plan.resident_experts_bytes / gpus)} ({plan.resident_expert_share:.0%} of them)",
        f"users in HBM = floor(what is left / KV of a user, in blocks of {BLOCK_SIZE}) x "
        f"{plan.layout.dp} groups = {plan.users_resident:,}",
        f"users in all tiers = {plan.users_resident:,} + host {gb(plan.host_bytes)} + disk "
        f"{gb(plan.disk_bytes)} = {plan.users_total:,}",
        f"users in each step = {plan.users_running:,} of {plan.request.workload.users:,}",
    ]
    if plan.resident_expert_share < 1:
        body.append(
            "Split between KV and experts: every number of users was tried; this one is fastest."
        )
    body.append(
        "Assumes: 10 % of HBM left to the driver; parked users swap every "
        f"{SLICE_TOKENS} tokens; host and disk hold what HBM does not."
    )
    return "Who fits", body


def _step(plan: Plan) -> Section:
    cost, shape, parts = plan.cost, plan.request.shape, plan.step.parts
    hw, c, layout = cost.hardware, cost.calibration, cost.layout
    users = -(-plan.users_running // layout.dp)
    mean = plan.users_running / layout.dp
    context = plan.request.workload.decode_context
    memory = cost.memory_bytes_per_s
    nominal = hw.hbm_bytes_per_s
    body = [
        f"HBM reached = {nominal / 1e9:,.0f} GB/s x {memory / nominal:.2f} = "
        f"{memory / 1e9:,.0f} GB/s; {users:,} users in the fullest group, "
        f"{context:,.0f} tokens each",
    ]
    bound = plan.step.bounds.get("dense_weights", "")
    body.append(
        f"dense weights: {'max' if c.reading_is_hidden else 'hypot'}"
        f"(read {gb(cost.shard.dense_read_bytes)} / HBM, 2 x "
        f"{(shape.matmul_params - shape.active_params + shape.dense_params) / 1e9:.2f} G x "
        f"{users} / "
        f"{layout.tp} / FLOP/s) = {seconds(parts['dense_weights'])} ({bound})"
    )
    if shape.moe_layers:
        tokens = mean * layout.groups_per_expert_set
        slots = cost.expert_slots_read(mean)
        body.append(
            f"distinct experts = E (1 - (1 - k/E)^B), E {shape.num_experts}, k "
            f"{shape.top_k_experts}, B {tokens:,.0f}: {slots:.1f} of "
            f"{cost.shard.expert_slots} slots "
            f"per GPU and layer; {gb(slots * cost.shard.slot_bytes)} = {seconds(parts['experts'])} "
            f"({plan.step.bounds['experts']})"
        )
    kv = shape.kv_read_bytes(context, plan.request.kv_dtype, tp=layout.tp) * users
    flops = shape.attention_flops_per_token(context, tp=layout.tp) * users
    body.append(
        f"attention: max({gb(kv)} / HBM, {flops / 1e12:.3g} TFLOP / FLOP/s x "
        f"{c.attention_efficiency}) = {seconds(parts['attention'])} "
        f"({plan.step.bounds['attention']})"
    )
    for name, text in _notes_on_parts(plan, users).items():
        if parts[name] > 0:
            body.append(f"{CAUSES[name]}: {text} = {seconds(parts[name])}")
    body += [
        f"expected = sum = {seconds(plan.step.expected_s)}; ceiling = "
        f"{seconds(plan.step.ceiling_s)} (nominal rates, all overlapped, no launches)",
        f"Assumes: {'collectives overlapped' if 'comm' in cost.overlap else 'nothing overlapped'}; "
        f"{'a measured expert histogram' if cost.routing.shares else 'uniform routing'}.",
    ]
    return "One decode step", body


def _notes_on_parts(plan: Plan, users: int) -> dict[str, str]:
    """How each part of a step that is no product is computed."""
    cost, c, shape = plan.cost, plan.cost.calibration, plan.request.shape
    context = plan.request.workload.decode_context
    link = f"{cost.link_bytes_per_s() / 1e9:.0f} GB/s"
    return {
        "all_reduce": _all_reduce_note(plan, users),
        "all_to_all": "each MoE layer gathers the rows of all groups and scatters the sums, or "
        "beyond k ranks sends k x (dispatch + combine) per token in "
        f"{2 * c.all_to_all_s * 1e6:.0f} us and more",
        "index": f"each of {users} x {context:,.0f} keys once, {shape.index_bytes_per_token:,} B "
        f"and {shape.index_pair_flops:,} operations each",
        "launch": f"kernels of all layers x {cost.kernel_s * 1e6:.2f} us",
        "per_user": f"{users} users x {c.user_s * 1e6:.1f} us"
        + (" less the device's time" if c.host_is_hidden else ""),
        "host_experts": "the cheaper of fetching misses and streaming all, one layer ahead, over "
        + link,
        "host_kv": f"{plan.streamed_kv_share:.0%} of KV over {link}",
        "swap": "what the link needs for parked users beyond the rest of the step",
        "prefill": "each running user starts a turn every --output-tokens steps",
    }


def _all_reduce_note(plan: Plan, users: int) -> str:
    cost, tp = plan.cost, plan.layout.tp
    message = users * cost.shape.hidden_size * 2
    each_s = cost.wire.all_reduce_s(tp, message)
    how = "measured" if tp in cost.hardware.together else "a ring over NVLink"
    return (
        f"2 per layer of B x d x 2 B = {gb(message)}, {seconds(each_s)} each ({how}), and the "
        f"logits {seconds(cost.logits_s(users))}"
    )


def _rate(plan: Plan) -> Section:
    band = plan.request.calibration.band
    rate = plan.tokens_per_s
    return "Tokens/s", [
        f"{plan.users_running:,} users / {seconds(plan.step.expected_s)} = {rate:,.1f} tokens/s, "
        f"{rate / plan.gpus:,.1f} per GPU",
        *(f"without {cause}: {gain:.3g}x" for cause, gain in plan.causes[:2]),
        f"Assumes: an engine of the usual kind; they differ, so take {band:.0%} either way.",
    ]


def _ttft(plan: Plan) -> Section:
    workload = plan.request.workload
    body = [
        f"prompt {workload.prompt_tokens:,.0f} tokens, of which {plan.turn.found:,.0f} are found "
        "in a tier",
        "prefill = max(2 x active parameters x tokens / FLOP/s, weights / HBM) + causal "
        f"attention + collectives + launches = {seconds(plan.turn.prefill_s)}",
    ]
    if plan.turn.found:
        body.append(
            f"loading {seconds(plan.turn.load_s)} while {plan.turn.recomputed:,} tokens are "
            "computed again from the front: both end together"
        )
    body += [
        f"TTFT = max(load, recompute) + new part = {seconds(plan.turn.ttft_s)}",
        f"Assumes: no queue; {plan.cost.calibration.compute_efficiency:.0%} of the nominal "
        "operations.",
    ]
    return "Time to first token", body


def _sources(plan: Plan) -> Section:
    hw = plan.request.hardware
    body = [f"{name}: {source}" for name, source in hw.sources.items()]
    body.append(f"host link: {hw.host_link}, {hw.host_link_bytes_per_s / 1e9:g} GB/s one way")
    if hw.host_link == "NVLink-C2C":
        body.append(
            "  900 GB/s is both directions summed; against PCIe 5 x16 it is 450 to 64, 7.0x"
        )
    return f"Where the figures of {hw.name} come from", body
