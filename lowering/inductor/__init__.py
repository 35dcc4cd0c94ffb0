"""The private parts of Inductor that this package uses, and with them what a new release of torch may have moved.

No other module of the operators' and their lowerings imports such parts. ``tables.py`` has those that operators are
entered into, and that are there when Inductor's own lowerings have just been defined, in the middle of the import of
Inductor; ``codegen.py`` has what code is generated with, which cannot be imported by then, and ``packaging.py`` what
is worked around while a package is compiled. What does not load costs all of the installation if it is in
``tables.py``, templates, call by call, if it is in ``codegen.py``, and ``export_detector`` if it is in
``packaging.py``.

All need Inductor's lowerings, which are imported here, so that those who wait for them (``installation/hook.py``) can
import ``tables.py`` in turn.
"""

import torch._inductor.lowering  # noqa: F401  (see above)
