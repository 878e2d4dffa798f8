"""`python -m arc.merging LORA MERGED` proves a merge."""

from arc.merging.merge import main

if __name__ == "__main__":
    main()
