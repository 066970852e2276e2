"""C++ for the operations that plain torch does badly on a CPU; compiled at first use, optional."""
