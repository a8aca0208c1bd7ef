"""Run Python that a model wrote: the program in a locked process, its judge in this one.

    def referee(game):                       # runs here; the program only ever sees copies of what is yielded
        while not game.over:
            game.play((yield (game.board(),)))
        return game.score

    with Sandbox(Limits(cpu_s=2)) as sandbox:
        outcome = sandbox.run(source, "strategy", referee(game))

docs/sandbox.md says what it protects and what it does not cover; `minigrpo sandbox --doctor` reports what this machine
supports. Loads no torch; may import types, errors and versions only.
"""

from minigrpo.sandbox.pool import Sandbox as Sandbox
from minigrpo.sandbox.pool import shared_sandbox as shared_sandbox
from minigrpo.sandbox.protocol import Limits as Limits
from minigrpo.sandbox.protocol import Outcome as Outcome
from minigrpo.sandbox.protocol import Plain as Plain
from minigrpo.sandbox.protocol import Referee as Referee
from minigrpo.sandbox.protocol import Verdict as Verdict
from minigrpo.sandbox.protocol import Wrong as Wrong
