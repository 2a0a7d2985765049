/* Notes for Python, one after another: see notes.h. */
#include "notes.h"

bool has_room(const struct notes *notes)
{
    return notes->bytes + NOTE_ROOM_BYTES <= NOTES_BYTES;
}

void note(struct notes *notes, enum note_kind kind, int peer, uint32_t value, const void *data,
          size_t bytes)
{
    const struct note head = {kind, peer, value, (uint32_t)bytes};

    if (bytes > NOTES_BYTES - sizeof head || notes->bytes > NOTES_BYTES - sizeof head - bytes)
        return; /* has_room was asked before; this is for what it did not foresee */
    memcpy(notes->data + notes->bytes, &head, sizeof head);
    if (bytes)
        memcpy(notes->data + notes->bytes + sizeof head, data, bytes);
    notes->bytes += (uint32_t)(sizeof head + bytes);
}
