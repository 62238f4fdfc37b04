"""What the training stages share: models, roles, the tree forward, losses, the loop, rollouts and guards."""

import logging

# bitsandbytes, which peft brings, tells at import of an optional kernel that it could not fetch.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
