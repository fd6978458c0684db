"""A hook of hatchling: refuse to build trellax from a tree in which the links of `.src/trellax` are broken."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinksHook(BuildHookInterface):
    """Stop a build, of a wheel or for an editable installation, that would lack folders."""

    def initialize(self, *_: Any) -> None:
        """Compare `.src/trellax` with the folders that it links to, before anything is packed."""
        lost = find_lost_links(Path(self.root))
        if lost:
            self.app.abort(
                f"trellax cannot be built from {self.root}: the symbolic links of .src/trellax are broken "
                f"({', '.join(lost)}). A ZIP unpacked without its links has small text files in their place.\n"
                "  Fix: use `git clone`, or install a wheel of trellax (docs/install.md)."
            )


def find_lost_links(root: Path) -> list[str]:
    """Return the packages at the top of the repository that `.src/trellax` does not lead to."""
    packages = sorted(file.parent.name for file in root.glob("*/__init__.py"))
    return [name for name in packages if not (root / ".src" / "trellax" / name / "__init__.py").is_file()]
