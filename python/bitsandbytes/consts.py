"""Where the package lies and what its native libraries are called."""

import sys
from pathlib import Path

PACKAGE_DIR = Path(__file__).parent
DYNAMIC_LIBRARY_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
# Kept for programs that name them.
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"
NONPYTORCH_DOC_URL = f"{PACKAGE_GITHUB_URL}/blob/main/docs/source/nonpytorchcuda.mdx"
