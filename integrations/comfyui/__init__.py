"""ComfyUI custom nodes: Wan and LTX-2 in a fraction of the transformer's evaluations.

Copyright (C) the heterostep authors. GPL-3.0-or-later, as ComfyUI is; the library `heterostep` itself is Apache-2.0.
"""

from .nodes import Heterostep, HeterostepReport

NODE_CLASS_MAPPINGS = {"Heterostep": Heterostep, "HeterostepReport": HeterostepReport}
NODE_DISPLAY_NAME_MAPPINGS = {"Heterostep": "Heterostep", "HeterostepReport": "Heterostep Report"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
