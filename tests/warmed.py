"""What processes would make or do again and again, made once in the server that they are forked from.

The last of :data:`distributed.PRELOADED`. transformers compiles a thousand regular expressions when it is first asked
how a model's weights are called; and what is here already takes no part in the garbage collections of a fork, each of
which would look at it all, and copy it by that.
"""

import contextlib
import gc

with contextlib.suppress(ImportError):  # another transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("mixtral")
gc.collect()
gc.freeze()
