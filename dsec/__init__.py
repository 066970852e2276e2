"""DSec: four kinds of sandbox behind one call, with a log that lets a trainer die and come back."""
