"""What ``echostream benchmark`` measures; see the modules."""
