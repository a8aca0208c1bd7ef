"""What a terminal shows: progress, the live panel, tables. Needs rich, loads no torch; may import types, errors and
versions only.
"""

from minigrpo.ui.progress import Report as Report
from minigrpo.ui.progress import stage as stage
from minigrpo.ui.tables import plain_table as plain_table
from minigrpo.ui.tables import titled as titled
