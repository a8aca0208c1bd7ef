"""Run Python that a model wrote: locked processes outside, the judge inside.

    def referee(game):                       # runs here; the program only ever sees copies of what is yielded
        while not game.over:
            game.play((yield (game.board(),)))
        return game.score

    with Sandbox(Limits(cpu_s=2)) as sandbox:
        outcome = sandbox.run(source, "strategy", referee(game))

What it protects, and what it does not cover, stands in docs/sandbox.md; what this machine grants says
`minigrpo sandbox --doctor`. No torch here.
"""

from minigrpo.sandbox.pool import Sandbox as Sandbox
from minigrpo.sandbox.pool import shared_sandbox as shared_sandbox
from minigrpo.sandbox.protocol import Limits as Limits
from minigrpo.sandbox.protocol import Outcome as Outcome
from minigrpo.sandbox.protocol import Plain as Plain
from minigrpo.sandbox.protocol import Referee as Referee
from minigrpo.sandbox.protocol import Verdict as Verdict
from minigrpo.sandbox.protocol import Wrong as Wrong
