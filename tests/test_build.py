# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What setup.py decides and says, without building anything."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_setup():
    spec = importlib.util.spec_from_file_location("resnet_fused_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_setup()


def run_setup(tmp_path, torch_source):
    """Runs `setup.py --version` with a torch that consists of torch_source."""
    (tmp_path / "torch.py").write_text(torch_source)
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


def test_without_torch_says_how_to_build(tmp_path):
    result = run_setup(tmp_path, "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    assert result.returncode != 0
    assert "pip install --no-build-isolation ." in result.stderr
    assert "Traceback" not in result.stderr


def test_broken_torch_shows_its_own_error(tmp_path):
    result = run_setup(tmp_path, "import a_module_that_torch_lacks")
    assert result.returncode != 0
    assert "a_module_that_torch_lacks" in result.stderr
    assert "--no-build-isolation" not in result.stderr


def test_unsupported_torch_stops_the_build(tmp_path):
    result = run_setup(tmp_path, "__version__ = '2.10.3+cu128'")
    assert result.returncode != 0
    assert "needs torch >= 2.11, < 2.16; installed is 2.10.3+cu128" in result.stderr


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "2.15.0a0+git0123abc", "2.15.9+cpu"])
def test_supported_torch(version):
    build.check_torch_version(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.2.2", "2.10.0", "2.16.0", "2.16.0a0+git0123abc", "3.0.0"])
def test_unsupported_torch(version):
    with pytest.raises(SystemExit, match=f"installed is {re.escape(version)}$"):
        build.check_torch_version(version)


@pytest.mark.parametrize("sources", [[], ["csrc/cuda/a.cu"]], ids=["no-sources", "sources"])
@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
@pytest.mark.parametrize("nvcc", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_cuda_unforced_is_built_only_with_all_it_takes(sources, torch_cuda, nvcc, gpu):
    wanted = sources == ["csrc/cuda/a.cu"] and torch_cuda == "13.0" and nvcc and gpu
    assert build.use_cuda(sources, torch_cuda, nvcc, gpu, force=False) is wanted


@pytest.mark.parametrize("gpu", [False, True])
def test_cuda_forced(gpu):
    assert build.use_cuda(["csrc/cuda/a.cu"], "13.0", nvcc=True, gpu=gpu, force=True) is True
    assert build.use_cuda([], "13.0", nvcc=True, gpu=gpu, force=True) is False


def test_cuda_forced_without_nvcc_says_what_to_install():
    for sources, gpu in itertools.product([[], ["csrc/cuda/a.cu"]], [False, True]):
        with pytest.raises(SystemExit, match=r"CUDA toolkit 13\.0.*CUDA_HOME"):
            build.use_cuda(sources, "13.0", nvcc=False, gpu=gpu, force=True)


def test_cuda_forced_with_a_torch_without_cuda():
    with pytest.raises(SystemExit, match="torch is built without CUDA"):
        build.use_cuda(["csrc/cuda/a.cu"], None, nvcc=True, gpu=False, force=True)


OLDER = [f"compute_{arch}" for arch in (75, 80, 86, 87, 89, 90)]  # of the toolkits before 12.8
NEWER = [*OLDER, "compute_100", "compute_103", "compute_110", "compute_120", "compute_121"]


def test_default_arch_list():
    assert build.default_arch_list(NEWER) == "7.5;8.0+PTX;8.6;8.9;9.0;10.0;12.0+PTX"
    assert build.default_arch_list(OLDER) == "7.5;8.0+PTX;8.6;8.9;9.0+PTX"


def test_the_cards_that_are_there_are_compiled_for():
    everything = build.default_arch_list(NEWER)
    assert build.arch_list([(8, 0)], NEWER, force=False) == "8.0"
    assert build.arch_list([(9, 0), (8, 6), (9, 0)], NEWER, force=False) == "8.6;9.0"
    assert build.arch_list([(12, 0), (8, 0)], NEWER, force=False) == "8.0;12.0"
    assert build.arch_list([(8, 0)], NEWER, force=True) == everything
    assert build.arch_list([], NEWER, force=False) == everything
    assert build.arch_list([(6, 1), (8, 0)], NEWER, force=False) == "8.0"
    assert build.arch_list([(6, 1)], NEWER, force=False) == everything
    # PTX is all that serves a card that is newer than nvcc.
    assert build.arch_list([(8, 0), (12, 0)], OLDER, force=False) == build.default_arch_list(OLDER)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_known_archs_are_nvcc_s():
    assert {"compute_80", "compute_90"} <= set(build.known_archs(shutil.which("nvcc")))


def test_default_cuda_arch_list_is_what_torch_knows(monkeypatch):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", build.default_arch_list(NEWER))
    flags = cpp_extension._get_cuda_arch_flags(build.NVCC_FLAGS)
    assert "-gencode=arch=compute_90,code=sm_90" in flags
    assert "-gencode=arch=compute_120,code=compute_120" in flags
    assert "-gencode=arch=compute_80,code=compute_80" in flags
    assert len(flags) == 9


def test_nvcc_flags_leave_torch_its_architectures():
    assert build.NVCC_FLAGS
    assert not [flag for flag in build.NVCC_FLAGS if "arch" in flag]


def test_sources_are_the_files_there_are():
    listed = build.CPP_SOURCES + build.WITHOUT_CUDA_SOURCES + build.CUDA_SOURCES
    assert len(listed) == len(set(listed))
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*")}
    assert set(listed) == {path for path in there if path.endswith((".cpp", ".cu"))}


@pytest.fixture
def wrapped_nvcc(tmp_path):
    """A toolkit's folder, and an environment whose nvcc is a script elsewhere that stands for it."""
    toolkit, wrapper = tmp_path / "toolkit", tmp_path / "bin" / "nvcc"
    for file in (toolkit / "include" / "cuda_runtime.h", toolkit / "bin" / "nvcc", wrapper):
        file.parent.mkdir(parents=True)
        file.touch()
    wrapper.write_text(f"#!/bin/sh\necho '#$ _SPACE_= ' >&2\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    return toolkit, {"PATH": str(wrapper.parent)}


def test_toolkit_behind_a_wrapper_is_found(wrapped_nvcc):
    toolkit, environ = wrapped_nvcc
    build.find_toolkit(environ)
    assert environ["CUDA_HOME"] == str(toolkit)


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_that_is_named_stays(wrapped_nvcc, name):
    environ = wrapped_nvcc[1] | {name: "/named"}
    build.find_toolkit(environ)
    assert environ == wrapped_nvcc[1] | {name: "/named"}


def test_toolkit_without_headers_is_not_taken(wrapped_nvcc):
    toolkit, environ = wrapped_nvcc
    (toolkit / "include" / "cuda_runtime.h").unlink()
    build.find_toolkit(environ)
    assert "CUDA_HOME" not in environ


def test_toolkit_is_not_there(tmp_path):
    environ = {"PATH": str(tmp_path)}
    build.find_toolkit(environ)
    assert environ == {"PATH": str(tmp_path)}


@pytest.fixture
def torch_with_cuda(tmp_path, monkeypatch):
    """torch as it looks with a GPU, a toolkit and headers in wheels: (torch, its site-packages)."""
    torch = pytest.importorskip("torch")
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_75\necho compute_90\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    nvcc.chmod(0o755)
    site_packages = tmp_path / "archive"  # contains the letters that nvcc's flags may not
    for folder in ("torch", "nvidia/cu13/include", "nvidia/cublas/include"):
        (site_packages / folder).mkdir(parents=True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__file__", str(site_packages / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "CUDA_SOURCES", ["csrc/cuda/a.cu"])
    monkeypatch.chdir(ROOT)
    return torch, site_packages


def test_extension_with_cuda(torch_with_cuda):
    torch, site_packages = torch_with_cuda
    environ = {"RESNET_FUSED_WERROR": "1"}
    extension = build.make_extension(torch, environ)
    assert extension.sources == build.CPP_SOURCES + ["csrc/cuda/a.cu"]
    assert ("RESNET_FUSED_VERSION", f'"{build.VERSION}"') in extension.define_macros
    assert environ["TORCH_CUDA_ARCH_LIST"] == "9.0"
    build.make_extension(torch, forced := {"FORCE_CUDA": "1"})
    assert forced["TORCH_CUDA_ARCH_LIST"] == "7.5;9.0+PTX"  # of what this nvcc knows
    build.make_extension(torch, named := {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.6"})
    assert named["TORCH_CUDA_ARCH_LIST"] == "8.6"
    wheels = [str(site_packages / "nvidia" / name / "include") for name in ("cu13", "cublas")]
    assert extension.include_dirs[-2:] == wheels
    cxx, nvcc = extension.extra_compile_args["cxx"], extension.extra_compile_args["nvcc"]
    assert [cxx[i + 1] for i, flag in enumerate(cxx) if flag == "-isystem"] == extension.include_dirs
    assert "-Werror" in cxx and "-Werror=all-warnings" in nvcc
    assert not [flag for flag in nvcc if "arch" in flag]
    assert "-lineinfo" not in nvcc
    with_lines = build.make_extension(torch, {"RESNET_FUSED_LINEINFO": "1"})
    assert "-lineinfo" in with_lines.extra_compile_args["nvcc"]
    environ = {"RESNET_FUSED_PTX_ONLY": "1", "TORCH_CUDA_ARCH_LIST": "7.5 8.0+PTX;9.0a+PTX"}
    ptx = build.make_extension(torch, environ).extra_compile_args["nvcc"]
    expected = [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ("80", "90a")]
    assert [flag for flag in ptx if "arch" in flag] == expected


def test_extension_without_gpu(torch_with_cuda, monkeypatch):
    torch, _ = torch_with_cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environ = {}
    extension = build.make_extension(torch, environ)
    assert extension.sources == build.CPP_SOURCES + build.WITHOUT_CUDA_SOURCES
    assert environ == {}
    assert not [flag for flag in extension.extra_compile_args["cxx"] if flag.startswith("-Werror")]

    forced = build.make_extension(torch, {"FORCE_CUDA": "1"})
    assert forced.sources == build.CPP_SOURCES + ["csrc/cuda/a.cu"]
    # Alike, so that the second build finds the first one's objects.
    assert forced.include_dirs == extension.include_dirs
    assert forced.define_macros == extension.define_macros
    assert forced.extra_compile_args["cxx"] == extension.extra_compile_args["cxx"]


def test_headers_are_dependencies(torch_with_cuda):
    extension = build.make_extension(torch_with_cuda[0], {})
    assert {"csrc/params.h", "csrc/cpu/kernels.inl"} <= set(extension.depends)


def test_compiler_that_is_missing_says_what_to_install(tmp_path):
    with pytest.raises(SystemExit, match="(?s)no-such-compiler.*apt-get install g\\+\\+"):
        build.check_compiler(str(tmp_path / "no-such-compiler"))


def test_compiler_without_cxx20_says_what_to_install(tmp_path):
    compiler = tmp_path / "old-compiler"
    compiler.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(SystemExit, match="(?s)unrecognized option -std=c\\+\\+20.*apt-get install g\\+\\+"):
        build.check_compiler(str(compiler))


def test_compiler_in_use_passes():
    build.check_compiler(os.environ.get("CXX", "c++"))


def test_build_isolation_does_not_bring_a_torch():
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert "setuptools" in requires
    assert "torch" not in requires


def test_makefile_installs_the_torch_that_setup_wants():
    (low, high) = build.TORCH_MIN, build.TORCH_END
    expected = f"TORCH := torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}\n"
    assert expected in (ROOT / "Makefile").read_text()


needs_repository = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs the repository"
)


def tracked(folder):
    command = ["git", "ls-files", folder]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@needs_repository
def test_wheel_holds_the_package(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "-d", tmp_path / "built"]
    subprocess.run(command, cwd=ROOT, check=True)
    built = tmp_path / "built"
    assert {str(p.relative_to(built)) for p in built.rglob("*") if p.is_file()} == tracked("resnet_fused")


@needs_repository
def test_sdist_holds_everything(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert tracked(".") - packed <= {".gitignore"}
