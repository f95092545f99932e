"""Properties have no time limit of their own: on a busy machine one example can take a second."""

from hypothesis import settings

settings.register_profile("memshard", deadline=None, print_blob=True)
settings.load_profile("memshard")
