"""What a terminal shows: progress, the live panel, tables. Needs rich; may import nothing of the package but the root's
words (types, errors, versions), and loads no torch.
"""

from minigrpo.ui.progress import Report as Report
from minigrpo.ui.progress import stage as stage
from minigrpo.ui.tables import plain_table as plain_table
from minigrpo.ui.tables import titled as titled
