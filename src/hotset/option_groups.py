"""The options of an engine by concern, each declared once: name, type, choices, bounds and help.

Imports no torch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hotset.layout import Layout
from hotset.option_fields import COUNT, SIZE, Bounds, Group, option

DType = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
KVDType = Literal["auto", "fp8"]
Activations = Literal["16", "8"]

_TIER_SIZE = Bounds("0 (none) or a size in GiB", 0, sys.float_info.max)
_SECONDS = Bounds("above 0 seconds", 0, is_open=True)


@dataclass(frozen=True, slots=True)
class ModelOptions(Group):
    """Which model runs, where, and in which numbers."""

    model: str | None = option(
        None,
        "A folder, a .gguf file or a hub id.",
        otherwise="SmolLM2-135M-Instruct",
        short="-m",
        keeps_answers=True,
    )
    device: str = option("auto", "auto, cpu or cuda.")
    dtype: DType = option(
        "auto",
        "Of weights and KV; auto is float32 on the CPU, the checkpoint's own on a GPU; fp8 has "
        "8-bit weights in linear layers and bfloat16 elsewhere.",
        more="The 8-bit floats (e4m3) have a scale for each output: near half the bytes, and not "
        "exact.",
    )
    kv_dtype: KVDType = option(
        "auto",
        "Of stored KV; auto is the dtype above, fp8 takes half of its bytes and is not exact.",
        more="fp8 is 8-bit floats (e4m3), with the scales of the checkpoint where it has some.",
    )
    index_dtype: KVDType = option(
        "auto",
        "Of the index keys of a model with sparse attention; auto is the dtype above, fp8 takes "
        "about half of its bytes and selects other tokens in part.",
        more="fp8 is 8-bit floats (e4m3) with one float32 scale per key, after a Hadamard "
        "transform, as DeepSeek runs its models. The engine says at start how many selected "
        "tokens are the same.",
    )
    activations: Activations = option(
        "16",
        "Bits of what weights in 8-bit floats are multiplied with: 8 rounds it in each product, "
        "which is faster for prompts and not exact.",
        more="For checkpoints in FP8 on one GPU of compute capability 8.9 or more. An input has a "
        "scale per token and block of columns, as the checkpoint's weights have.",
    )
    allow_widening: bool = option(
        False,
        "Widen experts, and all weights of a GGUF file, that a checkpoint has in few bits and that "
        "cannot stay so, instead of refusing the model.",
        more="They take two to four times the memory then. It is for GPUs, for `--tp`, and for "
        "experts in host memory: a CPU alone widens what it keeps itself in any case.",
        keeps_answers=True,
    )


@dataclass(frozen=True, slots=True)
class MemoryOptions(Group):
    """Memory of the device, of the host and on disk."""

    hot_gib: float | None = option(
        None,
        "KV memory beside the chip, in GiB; of an MoE model KV and experts together, unless "
        "expert_slots or expert_gib sizes those.",
        bounds=SIZE,
        otherwise="what the weights leave",
        keeps_answers=True,
    )
    total_gib: float | None = option(
        None,
        "All memory to use beside the chip, in GiB: weights, experts, KV and workspace. Instead "
        "of hot_gib.",
        bounds=SIZE,
        more="Split between KV and experts as hot_gib is.",
        keeps_answers=True,
    )
    host_gib: float = option(
        0.0, "Host memory for KV, in GiB; 0 is none.", bounds=_TIER_SIZE, keeps_answers=True
    )
    hot_tokens: int | None = option(
        None,
        "Tokens per layer that a request keeps on the device while others wait, of a model with "
        "sparse attention; 0 is all of them.",
        bounds=Bounds("0 (all) to 32768 tokens", 0, 2**15),
        otherwise="twice what a step selects, where the cost model says that it pays",
        more="Its other tokens are in host memory, and those that a step selects are fetched: more "
        "requests run at once, and each has its answer later. With a number, requests do so "
        "whenever others wait that would fit then.",
        keeps_answers=True,
    )
    row_prefetch: int = option(
        0,
        "Rows of hot requests that are fetched early: 0 none, 1 those of layers that share a "
        "selection, 2 also those that the next layer is guessed to select.",
        bounds=Bounds("0 to 2", 0, 2),
        more="On a GPU, while the layers before them compute. With 0 they come with the rows of "
        "the layer that selects. The guess is the next layer's own indexer on this layer's input; "
        "what it gets wrong is fetched when the layer selects, so that no answer changes.",
        keeps_answers=True,
    )
    disk_gib: float = option(
        0.0, "Disk space for KV, in GiB; 0 is none.", bounds=_TIER_SIZE, keeps_answers=True
    )
    disk_path: Path | None = option(
        None,
        "Folder of the disk tier.",
        otherwise="in the platform's cache folder",
        keeps_answers=True,
    )
    disk_read_deadline_s: float = option(
        5.0,
        "A read from disk, of KV or of an expert, that takes longer counts as failed.",
        bounds=_SECONDS,
        has_flag=False,
        keeps_answers=True,
    )
    disk_write_queue_s: float = option(
        2.0,
        "A block waits at most this long for its write to disk.",
        bounds=_SECONDS,
        has_flag=False,
        keeps_answers=True,
    )
    remote: tuple[str, ...] = option(
        (),
        "A store that replicas share KV blocks in: redis://[user:password@]host:port or "
        "unix:///path; several times for several stores.",
        more="Any server of the Redis protocol whose memory has a bound (`maxmemory`, with "
        "`allkeys-lru`).",
        otherwise="no store",
        metavar="URL",
        keeps_answers=True,
    )
    remote_secret_file: Path | None = option(
        None,
        "File with the secret by which blocks that go to a store or to peers are sealed.",
        more="Replicas of another secret find none of them, and believe none of theirs.",
        keeps_answers=True,
    )
    peer_url: str | None = option(
        None,
        "Where other replicas may fetch blocks from this one's host memory, and that it may fetch "
        "theirs: unix:///path or redis://host:port.",
        otherwise="nowhere",
        more="It asks those that a request names. They have the same secret, and at most a quarter "
        "of a core's time goes to them.",
        keeps_answers=True,
    )
    remote_encrypt: bool = option(
        False, "Encrypt blocks that leave; they are sealed in any case.", keeps_answers=True
    )
    remote_share: Literal["same", "any"] = option(
        "same",
        "With which replicas to share blocks: those that round numbers the same way, or any.",
        more="With `any`, blocks of another kind of GPU or another version of PyTorch are used "
        "too, and answers are the same but for rounding.",
        keeps_answers=True,
    )
    remote_writer: str | None = option(
        None,
        "Name under which blocks are written to a store, by which they can be revoked.",
        otherwise="the host's name and the process's number",
        keeps_answers=True,
    )
    block_size: int | None = option(
        None,
        "Tokens a KV block holds.",
        bounds=Bounds("1 to 1024 tokens", 1, 1024),
        otherwise="16; 64 of models whose layers cache latents (MLA)",
        keeps_answers=True,
    )
    prefix_caching: bool = option(
        True, "Find known prompt beginnings instead of computing them.", keeps_answers=True
    )
    fetch_policy: Literal["auto", "fetch", "recompute"] = option(
        "auto",
        "How blocks in a slower tier come back; auto decides by cost.",
        keeps_answers=True,
    )


@dataclass(frozen=True, slots=True)
class ScheduleOptions(Group):
    """What a step takes, and whose turn it is."""

    max_num_seqs: int = option(
        256,
        "Most requests in one step.",
        bounds=Bounds("1 to 1048576", 1, 2**20),
        keeps_answers=True,
    )
    max_num_batched_tokens: int = option(
        2048,
        "Most tokens in one step.",
        bounds=COUNT,
        more="Of prompts and decodes together.",
        keeps_answers=True,
    )
    max_mixed_tokens: int | None = option(
        None,
        "Most tokens in a step of prompts beside decodes.",
        bounds=COUNT,
        otherwise="256 on a CPU, 1024 on a GPU, more there for a Mixture of Experts or with "
        "rotation_s; in any case about what takes 0.25 s",
        more="A long prompt would hold up the decodes. On a GPU a Mixture of Experts gets 512 rows "
        "per expert if that is more. With experts in host memory, or with rotation_s, it is all "
        "of max_num_batched_tokens there.",
        keeps_answers=True,
    )
    max_model_len: int | None = option(
        None,
        "Longest context in tokens.",
        bounds=Bounds("2 or more", 2),
        otherwise="the model's own",
        more="As far as the hot tier holds it.",
    )
    tpot_ms: float | None = option(
        None,
        "Milliseconds per output token up to which requests turn hot, as the cost model predicts.",
        bounds=Bounds("above 0 milliseconds", 0, is_open=True),
        otherwise="no bound",
        more="Of models with sparse attention: see --hot-tokens.",
        keeps_answers=True,
    )
    rotation_s: float | None = option(
        None,
        "Seconds after which requests give way to those without a first token; needs a host tier.",
        bounds=_SECONDS,
        otherwise="first come, first served",
        more="A request that has waited this long for its first token takes the place of one that "
        "has run this long, whose KV waits in the host tier: every user sees a first token sooner, "
        "and the last one later. Takes place only while the host tier has room for all of it.",
        keeps_answers=True,
    )


@dataclass(frozen=True, slots=True)
class FormOptions(Group):
    """Bounds of outputs that follow a JSON schema, where the schema leaves another way.

    They give way to larger ones that the schema names itself.
    """

    json_max_digits: int = option(
        20,
        "Most digits in each part of a number of structured output; 0 is no bound.",
        bounds=Bounds("0 (no bound) or more", 0),
        more="The integer part and the fraction, each.",
    )
    json_max_string: int | None = option(
        None,
        "Most characters in a string of structured output.",
        bounds=COUNT,
        otherwise="no bound",
        more="To the end of the token that reaches it.",
    )
    json_max_items: int | None = option(
        None, "Most items in an array of structured output.", bounds=COUNT, otherwise="no bound"
    )
    json_max_depth: int | None = option(
        None, "Most levels of nesting in structured output.", bounds=COUNT, otherwise="no bound"
    )


@dataclass(frozen=True, slots=True)
class LayoutOptions(Group):
    """How a model is spread over the GPUs of this machine."""

    gpus: int | None = option(
        None,
        "GPUs of one engine. Without tp and dp the cost model chooses how they share the model, "
        "and start prints the three best layouts.",
        bounds=COUNT,
        otherwise="those of tp and dp",
        keeps_answers=True,
    )
    tp: int = option(
        1,
        "GPUs that compute each layer together, each with a part of its weights and KV.",
        bounds=COUNT,
        more="hot_gib and total_gib are for each GPU; host_gib, disk_gib and expert_gib's host "
        "copies are for all together. With the device cpu it is processes, for tests.",
        keeps_answers=True,
    )
    dp: int = option(
        1,
        "GPUs that each attend for their own requests, and share the experts of the model.",
        bounds=COUNT,
        more="Each has all other weights. max_num_seqs and max_num_batched_tokens are for all GPUs "
        "together: each gets its part.",
        keeps_answers=True,
    )
    ep: bool = option(
        False,
        "With tp or dp, give each GPU whole experts in place of a part of each.",
        more="For experts that cannot be cut. All of them stay on the GPUs.",
        keeps_answers=True,
    )
    step_timeout_s: float = option(
        60.0,
        "With several GPUs, a step that takes longer ends the engine, and the server starts anew.",
        bounds=_SECONDS,
        keeps_answers=True,
    )

    @property
    def spread(self) -> Layout:
        """The same as planners have it; of one GPU where it is yet to be chosen."""
        gpus = self.tp * self.dp
        return Layout(self.tp, self.dp, *((gpus, 1) if self.ep else (1, gpus)))

    @property
    def num_gpus(self) -> int:
        """Of the engine, and of its ranks."""
        return max(self.spread.gpus, self.gpus or 1)


@dataclass(frozen=True, slots=True)
class RuntimeOptions(Group):
    """How the process computes."""

    eager: bool = option(
        False,
        "Do not compile the model: slower, but starts sooner.",
        more="On a GPU without `torch.compile` and CUDA graphs.",
        keeps_answers=True,
    )
    threads: int | None = option(
        None,
        "CPU threads that compute.",
        bounds=COUNT,
        otherwise="as many as affinity and a container's quota allow",
        more="It holds for the process.",
        keeps_answers=True,
    )
    seed: int = option(0, "Of requests that sample and bring no seed.", has_flag=False)
    kv_events: str | None = option(
        None,
        "Publish where KV blocks are, as vLLM does, for routers that read its events: the address "
        "to bind by ZMQ, such as tcp://127.0.0.1:5557.",
        more="Needs the extra `events`. Events have the tokens of all prompts, and each process "
        "that can connect reads them: bind no address of an open network.",
        otherwise="off",
        metavar="ADDRESS",
        keeps_answers=True,
    )
    kv_events_topic: str = option(
        "",
        "Topic of these events; llm-d reads a replica's name and a model's out of kv@NAME@MODEL.",
        keeps_answers=True,
    )
