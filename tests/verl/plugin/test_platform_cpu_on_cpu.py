"""The CPU platform, each check in a process of its own: verl resolves its platform once per process."""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("verl")

RANK_0_OF_1 = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def run(code: str, free_port: int | None = None, **environment: str) -> subprocess.CompletedProcess:
    ports = {"MASTER_PORT": str(free_port)} if free_port else {}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "VERL_PLATFORM": "cpu", **RANK_0_OF_1, **ports, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_ok(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stderr


def test_entry_point_registers_the_platform():
    assert_ok(
        run(
            """
            import torch
            from verl.utils import device
            from verl.plugin.platform import get_platform

            assert type(get_platform()).__module__ == "cello1_verl.plugin.platform.platform_cpu"
            assert device.get_device_name() == "cpu" and device.get_nccl_backend() == "gloo"
            assert torch.ones(2).to(device.get_device_id()).device.type == "cpu"
            assert device.is_device_available() and not device.is_support_ipc()
            """
        )
    )


def test_device_module_has_what_verl_calls_on_it():
    assert_ok(
        run(
            """
            import torch
            from verl.utils.device import get_torch_device
            from verl.utils.profiler.performance import log_gpu_memory_usage
            from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

            device = get_torch_device()
            free, total = device.mem_get_info()
            assert 0 < free < total
            assert 0 < device.memory_allocated() <= total and device.max_memory_allocated() > 0
            assert device.get_device_name() == "CPU" and device.is_available()
            device.set_device(3); device.synchronize(); device.empty_cache(); device.ipc_collect()
            log_gpu_memory_usage("here")
            state = BaseCheckpointManager.get_rng_state()
            first = torch.rand(3)
            BaseCheckpointManager.load_rng_state(state)
            assert torch.equal(first, torch.rand(3))
            """
        )
    )


def test_a_gpu_platform_is_not_displaced_by_auto_detection():
    assert_ok(
        run(
            """
            from verl.plugin.platform.platform_manager import PlatformRegistry, _detect_platform_name

            assert PlatformRegistry.get("cpu") is not None
            assert _detect_platform_name() == "nvidia"
            """,
            VERL_PLATFORM="",
        )
    )


def test_process_group_starts_on_gloo(free_port):
    assert_ok(
        run(
            """
            import torch
            from verl.utils.distributed import initialize_global_process_group_ray

            initialize_global_process_group_ray()
            ones = torch.ones(1)
            torch.distributed.all_reduce(ones)
            assert ones.item() == 1
            """,
            free_port,
        )
    )


def test_the_distributed_patch_is_still_needed(free_port):
    """Fails once upstream leaves the duplicate device out: then delete verl/utils/distributed_cpu.py."""
    result = run(
        """
        from verl.utils.distributed import initialize_global_process_group_ray

        initialize_global_process_group_ray.__wrapped__()
        """,
        free_port,
    )
    assert result.returncode != 0
    assert "Duplicate device type cpu" in result.stderr


def test_engines_are_registered_for_fsdp2_only():
    assert_ok(
        run(
            """
            from verl.workers.engine import EngineRegistry
            from cello1_verl.workers.engine.fsdp.cpu_impl import FSDPCPUEngineWithLMHead, FSDPCPUEngineWithValueHead

            assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is FSDPCPUEngineWithLMHead
            assert EngineRegistry.get_engine_cls("value_model", "fsdp2") is FSDPCPUEngineWithValueHead
            try:
                EngineRegistry.get_engine_cls("language_model", "fsdp")
            except ValueError as error:
                assert "device='cpu'" in str(error)
            else:
                raise AssertionError("FSDP1 cannot run on the CPU and must not be registered")
            """
        )
    )


def test_the_weight_sync_patch_is_still_needed():
    """Fails once vLLM keeps the weight loader of a packed layer: then delete cpu_weight_sync.py."""
    pytest.importorskip("vllm")
    assert_ok(
        run(
            """
            import torch
            from vllm import _custom_ops
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
            from cello1_verl.workers.rollout.vllm_rollout.cpu_weight_sync import register

            def layer_after_dispatch():
                layer = torch.nn.Linear(32, 32)
                layer.weight.weight_loader = lambda *arguments: None
                dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
                return layer

            assert _custom_ops._supports_onednn
            assert not hasattr(layer_after_dispatch().weight, "weight_loader")
            register()
            assert hasattr(layer_after_dispatch().weight, "weight_loader")
            """
        )
    )


def test_weight_sync_patch_stays_out_of_serving():
    pytest.importorskip("vllm")
    assert_ok(
        run(
            """
            from vllm import _custom_ops
            from cello1_verl.workers.rollout.vllm_rollout.cpu_weight_sync import register

            before = _custom_ops._supports_onednn
            register()
            assert _custom_ops._supports_onednn == before
            """,
            VERL_PLATFORM="",
        )
    )


def test_the_log_probability_patch_is_still_needed():
    """Fails once upstream computes log-probabilities in one piece: then delete torch_functional_cpu.py."""
    assert_ok(
        run(
            """
            import torch
            from torch.utils._python_dispatch import TorchDispatchMode
            from verl.utils.torch_functional import logprobs_from_logits
            from cello1_verl.utils.torch_functional_cpu import apply

            class Count(TorchDispatchMode):
                operations = 0

                def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                    self.operations += 1
                    return function(*arguments, **(keywords or {}))

            def compute():
                with Count() as count:
                    return logprobs_from_logits(logits, labels), count.operations

            logits, labels = torch.randn(200, 9), torch.randint(9, (200,))
            before, many = compute()
            apply()
            after, few = compute()
            assert many > 200 > 20 > few, (many, few)
            assert torch.allclose(before, after, atol=1e-6)
            """
        )
    )


@pytest.mark.parametrize("tag", ["", "run-a"])
def test_a_run_that_chose_nothing_finds_nothing_replaced(tag):
    result = run(
        """
        import verl.utils.torch_functional
        from ray.runtime_context import RuntimeContext
        from verl.plugin.platform.platform_manager import PlatformRegistry
        from verl.utils import distributed

        assert PlatformRegistry.get("cpu") is not None, "the plugin was loaded"
        assert not hasattr(distributed.initialize_global_process_group_ray, "__wrapped__")
        functions = verl.utils.torch_functional
        assert functions.logprobs_from_logits_v2 is not functions.logprobs_from_logits_naive
        print(hasattr(RuntimeContext.get_job_id, "ipc_tag"))
        """,
        VERL_PLATFORM="",
        VERL_IPC_TAG=tag,
    )
    assert_ok(result)
    assert result.stdout.split()[-1] == str(bool(tag))


def test_sender_and_receiver_of_weights_have_a_socket_of_their_run():
    """The path that both sides make from Ray's job id: the same within a run, another in the next."""
    code = """
        import ray
        import verl
        ray.is_initialized = lambda: True
        print(ray.get_runtime_context().get_job_id())
        """
    found = [run(code, VERL_IPC_TAG=tag) for tag in ("cello1-a", "cello1-b")]
    for result in found:
        assert_ok(result)
    assert [result.stdout.split()[-1] for result in found] == ["ffffffff-cello1-a", "ffffffff-cello1-b"]


LISTENING = """
    import psutil, torch
    import {module}
    from torch.distributed import TCPStore, init_process_group
    from torch.distributed.rendezvous import _create_c10d_store, default_pg_timeout
    {before}

    def listening():
        return sorted({{found.laddr.ip for found in psutil.Process().net_connections() if found.status == "LISTEN"}})

    init_process_group("gloo", init_method="{method}", rank=0, world_size=1)
    again = _create_c10d_store("127.0.0.1", {port}, 0, 1, default_pg_timeout)
    again.set("a", "b")
    other = TCPStore("127.0.0.1", {port}, is_master=False)
    assert other.get("a") == b"b"
    print(*listening())
    """


@pytest.mark.parametrize("method", ["env://", "tcp://127.0.0.1:{port}"])
@pytest.mark.parametrize(
    ("module", "before"),
    [
        ("verl", ""),
        ("vllm", "from cello1_verl.workers.rollout.vllm_rollout.cpu_weight_sync import register; register()"),
    ],
)
def test_the_store_of_a_run_listens_on_this_machine_alone(free_port, module, before, method):
    pytest.importorskip(module)
    code = LISTENING.format(module=module, before=before, port=free_port, method=method.format(port=free_port))
    variables = {"VERL_LOOPBACK_STORE": "1", "GLOO_SOCKET_IFNAME": "lo", "VERL_PLATFORM": ""}
    result = run(code, free_port, **variables)
    assert_ok(result)
    assert result.stdout.split()[-1] == "127.0.0.1" and "::" not in result.stdout


def test_the_store_patch_is_still_needed(free_port):
    """Fails once torch listens where the host says: then delete loopback_store.py."""
    result = run(LISTENING.format(module="torch", before="", port=free_port, method="env://"), free_port)
    assert_ok(result)
    assert "::" in result.stdout.split()


def test_a_port_that_is_taken_is_reported_by_torch():
    result = run(
        """
        import socket
        import verl
        from torch.distributed.rendezvous import _create_c10d_store, default_pg_timeout

        taken = socket.create_server(("127.0.0.1", 0))
        _create_c10d_store("127.0.0.1", taken.getsockname()[1], 0, 1, default_pg_timeout)
        """,
        VERL_LOOPBACK_STORE="1",
    )
    assert result.returncode == 1
    assert "EADDRINUSE" in result.stderr
