"""A finished plan, and the object that `--json` prints."""

from dataclasses import dataclass

from hotset.cost.hot_plan import HotPlan
from hotset.cost.step_time import CostModel, Step
from hotset.layout import Layout
from hotset.plan import hot_set
from hotset.plan.choices import Choice, Turn
from hotset.plan.workload import Request


@dataclass(frozen=True)
class Plan:
    """Where every byte lives and how fast it runs. Bytes are summed over all GPUs."""

    request: Request
    layout: Layout
    gpus: int
    kv_bytes_per_user: int
    kv_copies: float
    hbm_bytes: float
    resident_weights_bytes: float
    resident_experts_bytes: float
    resident_kv_bytes: float
    workspace_bytes: float
    reserve_bytes: float
    host_bytes: float
    host_experts_bytes: float
    host_kv_bytes: float
    disk_bytes: float
    disk_kv_bytes: float
    fits_whole: bool  # all weights and one user at least lie in HBM, if wanted
    users_resident: int
    users_total: int
    mode: str
    choice: Choice
    causes: list[tuple[str, float]]
    cost: CostModel
    notes: list[str]
    hot_set: HotPlan | None = None  # of one group

    @property
    def step(self) -> Step:
        """A step of all users that run at once."""
        return self.choice.step

    @property
    def turn(self) -> Turn:
        """How the prompt of a turn becomes KV."""
        return self.choice.turn

    @property
    def users_running(self) -> int:
        """Users in each step."""
        return self.choice.running

    @property
    def resident_expert_share(self) -> float:
        """Share of the experts in HBM."""
        return self.choice.tiering.resident_experts

    @property
    def streamed_kv_share(self) -> float:
        """Share of the running users' KV that each step reads over the link."""
        return self.choice.tiering.host_kv

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all users together."""
        return self.users_running / self.step.expected_s

    @property
    def free_bytes(self) -> float:
        """HBM that nothing uses."""
        used = (
            self.resident_weights_bytes
            + self.resident_experts_bytes
            + self.resident_kv_bytes
            + self.workspace_bytes
            + self.reserve_bytes
        )
        return self.hbm_bytes - used

    def as_dict(self) -> dict[str, object]:
        """The object that `--json` prints."""
        request, workload = self.request, self.request.workload
        band, rate = request.calibration.band, self.tokens_per_s
        most = self.users_running / self.step.ceiling_s
        data = {
            **self._model(),
            "hardware": request.hardware.name,
            "gpus": self.gpus,
            "layout": str(self.layout),
            "users": workload.users,
            "context_tokens": workload.context,
            "output_tokens": workload.output,
            "turns": workload.turns,
            **self._places(),
            "users_resident": self.users_resident,
            "users_total": self.users_total,
            "users_running": self.users_running,
            "mode": self.mode,
            "streamed_kv_share": self.streamed_kv_share,
            "step": {
                "ceiling_s": self.step.ceiling_s,
                "expected_s": self.step.expected_s,
                "parts": self.step.parts,
                "bounds": self.step.bounds,
            },
            "bottleneck": self.causes[0][0],
            "runner_up": self.causes[1][0],
            "gain_without": dict(self.causes),
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / self.gpus,
            "tokens_per_s_per_user": rate / workload.users,
            "tpot_s": self.step.expected_s,
            "ttft_s": self.turn.ttft_s,
            "prefill_s": self.turn.prefill_s,
            "load_s": self.turn.load_s,
            "reused_tokens": self.turn.found,
            "recomputed_tokens": self.turn.recomputed,
            "band": {"low": rate * (1 - band), "high": min(most, rate * (1 + band))},
            "hot_set": hot_set.as_dict(self.hot_set, self.layout.dp),
            "notes": self.notes,
        }
        whole = _whole_bytes(data)
        assert isinstance(whole, dict)
        return whole

    def _model(self) -> dict[str, object]:
        """The model, and the bytes of it and of its users' KV."""
        shape, dtype = self.request.shape, self.request.kv_dtype
        return {
            "model": {
                "name": shape.name,
                "model_type": shape.model_type,
                "source": shape.source,
                "total_params": shape.total_params,
                "active_params": shape.active_params,
                "layers": len(shape.layers),
                "attention_layers": shape.kinds(),
                "experts_per_layer": shape.num_experts,
                "top_k_experts": shape.top_k_experts,
                "weights_dtype": shape.matrix_dtype,
                "kv_dtype": dtype,
            },
            "weights_bytes": shape.weights_bytes,
            "dense_bytes": shape.dense_bytes,
            "expert_bytes_each": shape.expert_bytes_each,
            "experts_bytes": shape.experts_bytes,
            "kv_bytes_per_token": shape.kv_bytes_per_token(dtype),
            "kv_bytes_per_early_token": shape.kv_bytes_per_early_token(dtype),
            "kv_bytes_per_user": self.kv_bytes_per_user,
            "state_bytes_per_user": shape.state_bytes,
            "kv_bytes_total": self.kv_bytes_per_user * self.request.workload.users,
            "kv_copies": self.kv_copies,
        }

    def _places(self) -> dict[str, object]:
        """What lies where, in bytes."""
        return {
            "hbm_bytes": self.hbm_bytes,
            "resident": {
                "weights_bytes": self.resident_weights_bytes,
                "experts_bytes": self.resident_experts_bytes,
                "kv_bytes": self.resident_kv_bytes,
                "workspace_bytes": self.workspace_bytes,
                "reserve_bytes": self.reserve_bytes,
                "free_bytes": self.free_bytes,
                "expert_share": self.resident_expert_share,
            },
            "host": {
                "bytes": self.host_bytes,
                "experts_bytes": self.host_experts_bytes,
                "kv_bytes": self.host_kv_bytes,
            },
            "disk": {"bytes": self.disk_bytes, "kv_bytes": self.disk_kv_bytes},
        }


def _whole_bytes(value: object, name: str = "") -> object:
    """Bytes as whole numbers, in nested objects too."""
    if isinstance(value, dict):
        return {key: _whole_bytes(item, key) for key, item in value.items()}
    if isinstance(value, float) and name.endswith("bytes"):
        return round(value)
    return value
