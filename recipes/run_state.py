"""The run folder, for scripts of one's own: `from run_state import open_folder`."""

from common.run_state import Position, open_folder, save_checkpoint

__all__ = ["Position", "open_folder", "save_checkpoint"]
