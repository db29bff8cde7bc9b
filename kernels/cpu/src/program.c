#include "program.h"

void program_run(const recorded_call *calls, int64_t num_calls, const cell *cells) {
    for (int64_t i = 0; i < num_calls; i++) calls[i].replay(cells + calls[i].first_cell);
}
