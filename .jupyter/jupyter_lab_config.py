"""What `make lab` opens: the repository, on its welcome page, with the kernel of its own environment.

The kernel is named as everywhere, so that a notebook saved here differs in nothing; here it reloads `lib` when a file
of it was saved. Headless runs start kernels of their own, which never do.
"""

from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager

HERE = Path(__file__).resolve().parent


class OwnKernels(KernelSpecManager):
    """The kernel of this environment, whatever others of the same name a user has."""

    def _kernel_dirs_default(self) -> list[str]:
        return [str(HERE / "kernels")]


c = get_config()  # noqa: F821
c.ServerApp.root_dir = str(HERE.parent)
c.ServerApp.kernel_spec_manager_class = OwnKernels
c.LabApp.default_url = "/lab/tree/notebooks/Welcome.md"
