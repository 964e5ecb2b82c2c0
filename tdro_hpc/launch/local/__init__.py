"""Jobs on this machine: started, followed and ended by the front door."""
