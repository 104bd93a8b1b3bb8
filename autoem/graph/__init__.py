"""The data flow of a model as JAX traced it: sliced, evaluated, grouped, compiled once; and arrays with named axes."""
