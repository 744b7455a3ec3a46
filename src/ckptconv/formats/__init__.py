"""Training formats: which tensor names a rank file holds, of which message keys they are made and how they are cut."""
