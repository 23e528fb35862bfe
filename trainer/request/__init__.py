"""What is asked for, checked without torch: the table of phases, one request, and the jobs a whole run takes."""
