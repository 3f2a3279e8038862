"""Lets ``_base_ = "mmseg::..."`` after it be found where mmsegmentation is installed under another distribution's name.

mmengine reads bases in their order, and looks for a module of this name when it knows no distribution.
"""

import mmengine.config.utils

mmengine.config.utils.MODULE2PACKAGE["mmseg"] = "mmseg"
