// What goes wrong and is told to the user: a sentence that says what is wrong and what to do.

/** status: as of HTTP; 0 where the source did not answer at all. */
export class SourceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "SourceError";
    this.status = status;
  }
}

/** Whether a request was called off because a newer one was made: nothing to tell. */
export const isAbort = (error) => error?.name === "AbortError";

/** The sentence to show. What is no SourceError is a fault of these pages: it goes to the console, too. */
export function sentence(error) {
  if (error instanceof SourceError) return error.message;
  console.error(error);
  return `Something went wrong in this page: ${error?.message ?? error}`;
}
