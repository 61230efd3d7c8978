"""What is measured: each module allocates one kind of workload, for any suite that names it with its own sizes."""
