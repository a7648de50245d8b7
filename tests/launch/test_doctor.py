"""The doctor reports whatever it finds, and breaks on nothing."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarl.launch import doctor

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (
    f"import sys; sys.path[:0] = [{{place!r}}, {str(ROOT)!r}]\nfrom megarl.launch import doctor; sys.exit(doctor.run())"
)


def diagnose(place: Path, *flags: str) -> tuple[int, str]:
    """Run the doctor in another process with the packages of ``place`` before those of the environment."""
    program = PROGRAM.format(place=str(place))
    done = subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True, cwd=place)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def break_torch(place: Path) -> None:
    """Put a torch before the real one that does not import, which also takes less time."""
    (place / "torch").mkdir()
    (place / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")


def install_fake(place: Path, name: str, version: str, *modules: str) -> None:
    """A package of that name with metadata, whose import raises."""
    metadata = place / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in modules:
        (place / module).mkdir(parents=True, exist_ok=True)
        (place / module / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")


def test_this_environment_can_train():
    said = []
    assert doctor.run(said.append) == 0
    assert "megarl train can run here" in said[0]
    assert "SGLang" in said[0]


def test_nothing_installed_is_a_report_and_a_failure(tmp_path):
    status, text = diagnose(tmp_path, "-S", "-I")
    assert status == 1
    assert "MISSING" in text
    assert "make setup  # torch, transformers, megatron-core, sglang, ray" in text
    assert "megarl train cannot run here" in text


@pytest.mark.parametrize(
    ("name", "version", "module", "says"),
    [
        ("apex", "0.9.10.dev0", "apex", "another project of that name"),
        ("transformer-engine", "2.20.2", "transformer_engine", "the empty meta package"),
    ],
)
def test_packages_that_break_megatron_are_found_without_importing_them(tmp_path, name, version, module, says):
    break_torch(tmp_path)
    install_fake(tmp_path, name, version, module)
    status, text = diagnose(tmp_path)
    assert status == 1
    assert f"{version} is" in text
    assert says in text


def test_a_transformer_engine_that_does_not_import_is_reported(tmp_path):
    break_torch(tmp_path)
    install_fake(tmp_path, "transformer-engine", "2.11.0", "transformer_engine")
    install_fake(tmp_path, "transformer-engine-torch", "2.11.0")
    status, text = diagnose(tmp_path)
    assert status == 1
    assert "2.11.0 does not import: RuntimeError" in text


def test_a_broken_torch_is_reported(tmp_path):
    break_torch(tmp_path)
    status, text = diagnose(tmp_path)
    assert status == 1
    assert "OSError: libcudart.so.13" in text
    assert "a run here would use" not in text


def test_a_version_outside_the_range_is_wrong_and_the_remedy_names_the_range():
    check = doctor._check_package("numpy", "arrays", "", "<1.0", required=True)
    assert check.state == "wrong"
    assert check.remedy == "pip install 'numpy<1.0'"


def find(*names: str):
    """``importlib.util.find_spec`` where only these modules are; apex with its usual folders."""
    return lambda name: SimpleNamespace(submodule_search_locations=["/apex"]) if name in names else None


def test_an_apex_without_its_kernels_is_wrong_and_the_remedy_builds_them(monkeypatch):
    cuda = doctor._Torch(cuda="13.0", devices=["H100"])
    monkeypatch.setattr(doctor.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", find("apex"))
    check = doctor._check_apex(cuda)
    assert (check.state, check.required) == ("wrong", True)
    assert "built without amp_C, fused_weight_gradient_mlp_cuda" in check.found
    assert check.remedy.startswith("APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", find("apex", "amp_C", "fused_weight_gradient_mlp_cuda"))
    assert doctor._check_apex(cuda).state == "ok"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", find())
    assert doctor._check_apex(cuda).state == "absent"


def test_cuda_before_13_is_wrong_and_a_login_node_needs_no_gpu():
    old = doctor._check_cuda(doctor._Torch(cuda="12.8", devices=["H100"]))
    assert (old.state, old.required, "cu130" in old.remedy) == ("wrong", True, True)
    assert doctor._check_cuda(doctor._Torch(cuda="13.0", devices=["H100"])).state == "ok"
    login = doctor._check_cuda(doctor._Torch(cuda="13.0"))
    assert (login.state, login.required) == ("absent", False)


def test_little_shared_memory_is_said_where_there_are_gpus(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=64 << 20))
    assert doctor._check_shared_memory(doctor._Torch()) == []
    (check,) = doctor._check_shared_memory(doctor._Torch(cuda="13.0", devices=["H100"]))
    assert (check.state, check.found) == ("wrong", "0.1 GiB free")


def test_gpus_are_counted_by_torch_and_by_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doctor._gpus(doctor._Torch()) == ""
    assert doctor._gpus(doctor._Torch(cuda="13.0", devices=["H100"])) == "torch: 1 here; Ray: 0 here"
