from hypothesis import settings

# How long an example takes says nothing here but how busy the machine is.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
